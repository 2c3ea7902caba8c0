"""Compare runs: their results, and one page with their curves over each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.differences import Difference
from trainer.evaluation.scores import LOGICKOR
from trainer.evaluation.scores import rows as benchmark_rows
from trainer.recording.results import headline_loss
from trainer.report.charts import Line, line_chart
from trainer.report.curves import validation_curves
from trainer.report.pages import page
from trainer.report.run import Run
from trainer.report.words import compact, count, duration, share

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Result:
    """One number of all runs, and its texts, of which the first run's is what the others are compared with."""

    label: str
    unit: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    better: Better = ""

    @property
    def best(self) -> int | None:
        """The place of the best run, None if that is no question or several are as good."""
        there = [value for value in self.values if value is not None]
        if not self.better or len(there) < 2:
            return None
        wanted = min(there) if self.better == "lower" else max(there)
        return self.values.index(wanted) if there.count(wanted) == 1 else None

    def changes(self) -> list[str]:
        """The difference of each run's number to the first run's; "" where there is none."""
        first, *others = self.values
        if not self.better or first is None:
            return [""] * len(self.values)
        return ["", *("" if value is None else f"{value - first:+.3f}".replace("-", "−") for value in others)]


def labels(runs: Sequence[Run]) -> list[str]:
    """Names for the runs: their own, with their folder if several have the same."""
    names = [run.spec.run for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} in {run.directory.resolve().parent}"
        for name, run in zip(names, runs, strict=True)
    ]


def results(runs: Sequence[Run]) -> list[Result]:
    """The rows of the table of results; a row that no run has is left out."""
    found = [
        _result(runs, "steps", "", lambda run: run.steps[-1]["step"], count),
        _result(runs, "tokens", "", lambda run: run.tokens, compact),
        _result(runs, "parameters", "", lambda run: run.parameters, compact),
        _result(runs, "final loss", "nats/token", lambda run: headline_loss(run.steps)[0], _three, "lower"),
        *_heldout(runs),
        *_validated(runs),
        *_benchmarks(runs),
        _result(runs, "speed", "tokens/s", _speed, count),
        _result(runs, "wall time", "", lambda run: sum(run.goodput.values()), duration),
        _result(runs, "of which steps", "", _useful, share),
        _result(runs, "restarts", "", lambda run: sum(run.causes.values()), count),
    ]
    return [each for each in found if any(value is not None for value in each.values)]


def render(runs: Sequence[Run], of: str, differences: Sequence[Difference]) -> str:
    """The page of a comparison.

    Args:
        differences: fields of the runs' specs, which `of` names, with a value for each run.
    """
    names = labels(runs)
    return page(
        "compare.html.j2",
        title=" / ".join(names),
        names=names,
        results=results(runs),
        curves=_curves(runs, names),
        of=of,
        differences=differences,
    )


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Figures with a line for each run over the tokens trained on."""

    def over_tokens(title: str, unit: str, key: str, *, smooth: bool = True, **options: Any) -> str:
        lines = [
            Line(name, [line["tokens"] for line in run.steps], [line.get(key) for line in run.steps], smooth)
            for name, run in zip(names, runs, strict=True)
        ]
        return line_chart(title, unit, lines, x_name="token", **options)

    figures = [over_tokens("Training loss", "nats per token", "loss", wide=True)]
    by_run = [{line.name: line for line in validation_curves(run)} for run in runs]
    for domain in dict.fromkeys(domain for found in by_run for domain in found):
        validated = [(name, found[domain]) for name, found in zip(names, by_run, strict=True) if domain in found]
        lines = [Line(name, line.x, line.y) for name, line in validated]
        figures.append(line_chart(f"Validation: {domain}", "bits per byte", lines, x_name="token"))
    figures += [
        over_tokens("Throughput", "tokens per second", "tokens_per_second", from_zero=True),
        over_tokens("Gradient norm", "before clipping", "grad_norm"),
        over_tokens("Learning rate", "of the matrices", "learning_rate", smooth=False, from_zero=True),
    ]
    return [figure for figure in figures if figure]


def _result(
    runs: Sequence[Run],
    label: str,
    unit: str,
    value: Callable[[Run], float | None],
    text: Callable[[float], str],
    better: Better = "",
) -> Result:
    values = tuple(value(run) for run in runs)
    return Result(label, unit, values, tuple("–" if each is None else text(each) for each in values), better)


def _heldout(runs: Sequence[Run]) -> list[Result]:
    """Bits per byte of eval.json by domain, of all domains last."""
    domains = dict.fromkeys(name for run in runs for name in (run.evaluation or {}).get("domains", {}))

    def row(label: str, scores: Callable[[dict[str, Any]], dict[str, Any]]) -> Result:
        def value(run: Run) -> float | None:
            return scores(run.evaluation).get("bits_per_byte") if run.evaluation else None

        return _result(runs, f"held-out, {label}", "bits per byte", value, _three, "lower")

    def of_domain(name: str) -> Result:
        return row(name, lambda evaluation: evaluation["domains"].get(name, {}))

    return [*map(of_domain, domains), row("all domains", lambda evaluation: evaluation["all"])]


def _validated(runs: Sequence[Run]) -> list[Result]:
    """Bits per byte of the last validation during training, for runs that have not all been evaluated."""
    if all(run.evaluation for run in runs):
        return []
    domains = dict.fromkeys(name for run in runs for line in run.validations[-1:] for name in line["domains"])

    def row(name: str) -> Result:
        def value(run: Run) -> float | None:
            return run.validations[-1]["domains"].get(name, {}).get("bits_per_byte") if run.validations else None

        return _result(runs, f"last validation, {name}", "bits per byte", value, _three, "lower")

    return [row(name) for name in domains]


def _benchmarks(runs: Sequence[Run]) -> list[Result]:
    """Scores with standard errors, in the order of the first run that has them."""
    scores = [{(row.task, row.metric): row for row in benchmark_rows(run.evaluation or {})} for run in runs]
    found = []
    for task, metric in dict.fromkeys(key for each in scores for key in each):
        there = [each.get((task, metric)) for each in scores]
        texts = tuple("–" if row is None else row.text for row in there)
        values = tuple(None if row is None else row.value for row in there)
        found.append(Result(task, metric, values, texts, _better(runs, task, metric)))
    return found


def _better(runs: Sequence[Run], task: str, metric: str) -> Better:
    """Whether more is better, as the evaluation says; LogicKor's points are."""
    for run in runs:
        numbers = (run.evaluation or {}).get("benchmarks", {}).get(task, {}).get("metrics", {})
        if (said := numbers.get(metric, {}).get("higher_is_better")) is not None:
            return "higher" if said else "lower"
    return "higher" if task == LOGICKOR else ""


def _speed(run: Run) -> float | None:
    """Mean tokens per second of the steps."""
    seconds = sum(line["seconds"] for line in run.steps)
    return sum(line["tokens_per_second"] * line["seconds"] for line in run.steps) / seconds if seconds else None


def _useful(run: Run) -> float | None:
    seconds = sum(run.goodput.values())
    return run.goodput.get("step", 0.0) / seconds if seconds else None


def _three(value: float) -> str:
    return f"{value:.3f}"
