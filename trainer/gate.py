"""Gates: whether what was measured of a trained model satisfies the spec (trainer/gatespec.py). Imports no torch.

eval.json keeps the result of each gate. They are compared again whenever they are asked for, as that costs nothing: a
changed gate needs no new evaluation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import latest, read_manifest
from trainer.errors import CheckpointError, GateError
from trainer.evaluation.scores import LOGICKOR
from trainer.fields import stored
from trainer.files import atomic_write
from trainer.gatespec import BENCHMARKS, HELDOUT, GateSpec
from trainer.recording.results import read_json
from trainer.spec import TrainSpec

FIELD = "train.evaluate.gate"
EVALUATION = "eval.json"
ALL = "all"
# Words in names of benchmarks' metrics of which less is better, where the results do not say it.
LESS_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "brier", "mse", "mae", "wer", "ter", "edit_distance")


def refuse(spec: TrainSpec) -> None:
    """Return if the newest checkpoint has passed all gates. Updates their results in eval.json and the report.

    Raises:
        GateError: it has not, or it has not been evaluated.
        CheckpointError: eval.json is damaged.
    """
    file = Path(spec.run_dir) / EVALUATION
    evaluation = read_json(file)
    if evaluation is not None and _is_of_newest(spec, evaluation):
        found = results(spec, evaluation)
        if found != evaluation.get("gates", []):
            evaluation = {name: value for name, value in evaluation.items() if name != "gates"}
            write(file, evaluation | ({"gates": found} if found else {}))
            _show_again(spec.run_dir)
        failed = [result["sentence"] for result in found if not result["passed"]]
    else:
        failed = [f"the newest checkpoint has not been evaluated ({FIELD})"] if spec.evaluate.gate else []
    if failed:
        raise GateError(
            f"gate: {'; '.join(failed)}; the model was not exported; change the gate or train longer, then "
            f"yaongi resume {spec.run}"
        )


def _show_again(run_dir: str) -> None:
    try:
        from trainer.report import update_report
    except ImportError:  # an image that draws no charts; the report says what eval.json does after the export
        return
    update_report(run_dir)


def write(file: Path, evaluation: dict[str, Any]) -> None:
    """Write eval.json, atomically."""
    atomic_write(file, (json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n").encode())


def results(spec: TrainSpec, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """For each gate its fields and `passed`, `value`, `threshold` (None if unknown) and `sentence`."""
    return [
        stored(gate) | _result(gate, f"{FIELD}[{number}]", evaluation, spec.run_dir)
        for number, gate in enumerate(spec.evaluate.gate)
    ]


def problem_before(gate: GateSpec, run_dir: str) -> str:
    """Why the baseline of a gate cannot be compared with, which is known before any work; "" if it can."""
    return "" if gate.better_than is None else _baseline(gate, run_dir)[1]


def baseline_file(gate: GateSpec, run_dir: str) -> Path:
    """The eval.json of another run: of a name, its folder, its export or the file itself."""
    assert gate.better_than is not None
    path = Path(gate.better_than) if gate.names_a_path else Path(run_dir).parent / gate.better_than
    if path.suffix == ".json":
        return path
    return (path.parent if path.name == "export" else path) / EVALUATION


def measured_value(metric: str, evaluation: dict[str, Any]) -> float | None:
    """The value of a metric in an eval.json; None if it has none."""
    kind, _, rest = metric.partition(".")
    if kind in HELDOUT:
        score = evaluation.get(ALL) if rest == ALL else evaluation.get("domains", {}).get(rest)
        return _number((score or {}).get(kind))
    return _number(_benchmark(rest, evaluation)[1].get("value"))


def _less_is_better(metric: str, evaluation: dict[str, Any]) -> bool:
    kind, _, rest = metric.partition(".")
    if kind in HELDOUT:
        return True
    name, found = _benchmark(rest, evaluation)
    if isinstance(said := found.get("higher_is_better"), bool):
        return not said
    words = f"_{re.sub(r'[^a-z0-9]+', '_', name.lower())}_"
    return any(f"_{each}_" in words for each in LESS_IS_BETTER)


def _benchmark(name: str, evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The metric of TASK.METRIC, and what eval.json says of it; empty if it says nothing."""
    for task, metric in splits(name):
        found: dict[str, Any] = _task(task, evaluation).get("metrics", {}).get(metric) or {}
        if found:
            return metric, found
    return name.rpartition(".")[2], {}


def _task(name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The scores of a benchmark, of a task in a group of them ("group/task"), or of the judge (logickor)."""
    benchmarks = evaluation.get(BENCHMARKS, {})
    group, _, inner = name.partition("/")
    found = benchmarks.get(group) or (evaluation.get(group) if group == LOGICKOR else None) or {}
    return found.get("subtasks", {}).get(inner, {}) if inner else found


def _others(metric: str, evaluation: dict[str, Any]) -> list[str]:
    """The metrics of the same benchmark that were measured."""
    kind, _, rest = metric.partition(".")
    if kind in HELDOUT:
        return []
    return next((sorted(found) for task, _ in splits(rest) if (found := _task(task, evaluation).get("metrics"))), [])


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Task and metric, either of which may contain dots."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:at]), ".".join(parts[at:])


def _result(gate: GateSpec, where: str, evaluation: dict[str, Any], run_dir: str) -> dict[str, Any]:
    value, label = measured_value(gate.metric, evaluation), _label(gate.metric)
    threshold, remark, at_most = gate.at_most, "", gate.at_least is None
    if gate.at_least is not None:
        threshold = gate.at_least
    elif gate.better_than is not None:
        at_most = _less_is_better(gate.metric, evaluation)
        other, problem = _baseline(gate, run_dir)
        if other is None:
            return {"passed": False, "value": value, "threshold": None, "sentence": f"{where}: {problem}"}
        threshold = other - gate.by if at_most else other + gate.by
        by = f" {'less' if at_most else 'plus'} {gate.by:g}" if gate.by else ""
        remark = f", {baseline_file(gate, run_dir).parent.name}'s {_shown(other)[0]}{by}"
    assert threshold is not None
    if value is None:
        there = f"; there is {', '.join(others)}" if (others := _others(gate.metric, evaluation)) else ""
        sentence = f"{label} was not measured ({where}){there}"
        return {"passed": False, "value": None, "threshold": threshold, "sentence": sentence}
    passed = value <= threshold if at_most else value >= threshold  # NaN does not pass
    shown, bound = _shown(value, threshold)
    sentence = f"{label} {shown} is{'' if passed else ' not'} {'≤' if at_most else '≥'} {bound}{remark} ({where})"
    finite = value if math.isfinite(value) else None
    return {"passed": passed, "value": finite, "threshold": threshold, "sentence": sentence}


def _baseline(gate: GateSpec, run_dir: str) -> tuple[float | None, str]:
    """The value to compare with; or None, and why there is none."""
    file = baseline_file(gate, run_dir)
    if file.absolute() == (Path(run_dir) / EVALUATION).absolute():
        return None, f"better_than {gate.better_than} is this run itself; name another"
    try:
        evaluation = read_json(file)
    except CheckpointError as error:
        return None, f"better_than {gate.better_than}: {error}"
    except OSError as error:
        return None, f"better_than {gate.better_than}: {file} cannot be read ({error.strerror}); name another"
    if evaluation is None:
        return None, f"better_than {gate.better_than}: {file} is not there; evaluate that run first, or name another"
    value = measured_value(gate.metric, evaluation)
    if value is None or not math.isfinite(value):
        return None, f"better_than {gate.better_than}: {file} has no {gate.metric}; measure it there first"
    return value, ""


def _is_of_newest(spec: TrainSpec, evaluation: dict[str, Any]) -> bool:
    checkpoint = latest(spec.run_dir)
    return checkpoint is not None and read_manifest(checkpoint).digest == evaluation.get("checkpoint_digest")


def _label(metric: str) -> str:
    kind, _, rest = metric.partition(".")
    if kind in HELDOUT:
        return f"{'held-out' if rest == ALL else rest} {kind.replace('_', ' ')}"
    return rest.replace(".", " ")


def _shown(*values: float) -> list[str]:
    """Numbers with four digits after the point, or as many as tell them apart."""
    for digits in (4, 8, 17):
        texts = [f"{value:.{digits}g}" if digits == 17 else f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
