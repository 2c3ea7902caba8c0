"""Gates: comparisons by hand, baselines, and what eval.json and the sentence say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run

from trainer import evaluate, export, gate
from trainer.errors import GateError
from trainer.evaluatespec import EvaluateSpec
from trainer.exitcodes import ExitCode, retryable
from trainer.gatespec import GateSpec
from trainer.specbase import SpecError, parse

EVALUATION: dict[str, Any] = {
    "domains": {"ko": {"bits_per_byte": 1.92, "loss": 3.5, "perplexity": 33.1}, "en": {"bits_per_byte": math.nan}},
    "all": {"bits_per_byte": 1.5},
    "benchmarks": {
        "kmmlu": {
            "metrics": {"acc": {"value": 0.31, "stderr": 0.01}, "word.perplexity": {"value": 20.0, "stderr": None}},
            "subtasks": {"kmmlu_law": {"metrics": {"acc": {"value": 0.25, "stderr": 0.02}}}},
        },
    },
    "logickor": {"metrics": {"overall": {"value": 5.5, "stderr": None}}},
}


def decided(run_dir: Path, **fields: Any) -> dict[str, Any]:
    return gate._result(GateSpec(**fields), "train.evaluate.gate[0]", EVALUATION, str(run_dir))


def test_metrics_are_found_where_eval_json_has_them():
    for metric, expected in {
        "bits_per_byte.ko": 1.92,
        "perplexity.ko": 33.1,
        "bits_per_byte.all": 1.5,
        "loss.code": None,
        "benchmarks.kmmlu.acc": 0.31,
        "benchmarks.kmmlu.word.perplexity": 20.0,
        "benchmarks.kmmlu/kmmlu_law.acc": 0.25,
        "benchmarks.logickor.overall": 5.5,
        "benchmarks.mmlu.acc": None,
        "benchmarks.kmmlu.f1": None,
    }.items():
        assert gate.measured_value(metric, EVALUATION) == expected, metric
    assert gate.measured_value("benchmarks.kmmlu.acc", {"domains": {}}) is None


def test_a_metric_that_was_not_measured_names_those_that_were(tmp_path: Path):
    said = decided(tmp_path, metric="benchmarks.kmmlu.f1", at_least=0.1)["sentence"]
    assert said == "kmmlu f1 was not measured (train.evaluate.gate[0]); there is acc, word.perplexity"
    assert (
        decided(tmp_path, metric="loss.code", at_most=9.0)["sentence"]
        == "code loss was not measured (train.evaluate.gate[0])"
    )
    (tmp_path / "file").touch()
    said = decided(tmp_path, metric="loss.ko", better_than=str(tmp_path / "file" / "run"))["sentence"]
    assert said.endswith("/eval.json cannot be read (Not a directory); name another")


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({"metric": "bits_per_byte.ko", "at_most": 1.92}, True),
        ({"metric": "bits_per_byte.ko", "at_most": 1.9199}, False),
        ({"metric": "bits_per_byte.ko", "at_least": 1.9}, True),
        ({"metric": "benchmarks.kmmlu.acc", "at_least": 0.31}, True),
        ({"metric": "benchmarks.kmmlu.acc", "at_least": 0.32}, False),
        ({"metric": "bits_per_byte.en", "at_most": 9.0}, False),  # NaN
        ({"metric": "bits_per_byte.en", "at_least": 0.0}, False),
        ({"metric": "loss.code", "at_most": 9.0}, False),
    ],
)
def test_bounds(tmp_path: Path, fields: dict[str, Any], passed: bool):
    assert decided(tmp_path, **fields)["passed"] is passed


@pytest.mark.parametrize(
    ("metric", "other", "by", "threshold", "passed"),
    [
        ("bits_per_byte.ko", 1.95, 0.02, 1.93, True),
        ("bits_per_byte.ko", 1.93, 0.02, 1.91, False),
        ("bits_per_byte.ko", 1.92, 0.0, 1.92, True),
        ("benchmarks.kmmlu.acc", 0.30, 0.005, 0.305, True),
        ("benchmarks.kmmlu.acc", 0.30, 0.02, 0.32, False),
        ("benchmarks.kmmlu.word.perplexity", 19.0, 0.0, 19.0, False),
    ],
)
def test_better_than_another_run(tmp_path: Path, metric: str, other: float, by: float, threshold: float, passed: bool):
    scores = {"domains": {"ko": {"bits_per_byte": other}}}
    name = metric.removeprefix("benchmarks.kmmlu.")
    scores["benchmarks"] = {"kmmlu": {"metrics": {name: {"value": other, "stderr": None}}}}
    directory = tmp_path / "runs" / "base-1"
    (directory / "export").mkdir(parents=True)
    (directory / "eval.json").write_text(json.dumps(scores))
    for named in ("base-1", str(directory), f"{directory}/export", f"{directory}/eval.json"):
        found = decided(tmp_path / "runs" / "own", metric=metric, better_than=named, by=by)
        assert found["passed"] is passed and found["threshold"] == pytest.approx(threshold), named
        assert "base-1's" in found["sentence"]


def test_whether_less_is_better_is_a_matter_of_the_metric_not_of_the_task():
    """Where the results do not say it. Names of tasks and metrics may contain "wer" or "ter"."""
    less = {"word.perplexity", "word_perplexity", "brier_score", "WER", "edit_distance,none", "ter"}
    more = {"acc", "exact_match,flexible-extract", "answer_f1", "literal", "better"}
    for metric in less | more:
        evaluation = {"benchmarks": {"computer_wer": {"metrics": {metric: {"value": 1.0}}}}}
        assert gate._less_is_better(f"benchmarks.computer_wer.{metric}", evaluation) is (metric in less), metric


def test_a_baseline_that_cannot_be_compared_with_is_said_before(tmp_path: Path):
    own, other = tmp_path / "runs" / "own", tmp_path / "runs" / "other"
    other.mkdir(parents=True)

    def said(named: str, metric: str = "loss.ko") -> str:
        return gate.problem_before(GateSpec(metric=metric, better_than=named), str(own))

    assert f"{other}/eval.json is not there; evaluate that run first" in said("other")
    (other / "eval.json").write_text(json.dumps({"domains": {"en": {"loss": 1.0}}}))
    assert "has no loss.ko" in said("other")
    assert said("other", "loss.en") == ""
    (other / "eval.json").write_text("{")
    assert "not a JSON object" in said("other")
    assert "is this run itself" in said("own")
    assert gate.problem_before(GateSpec(metric="loss.ko", at_most=1.0), str(own)) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "bpb.ko", "at_most": 1.0}, "metric 'bpb.ko' is unknown; write bits_per_byte.D, loss.D"),
        ({"metric": "bits_per_byte", "at_most": 1.0}, "is unknown"),
        ({"metric": "bits_per_byte.ko.x", "at_most": 1.0}, "is unknown"),
        ({"metric": "benchmarks.kmmlu", "at_least": 1.0}, "is unknown"),
        ({"metric": "loss.ko"}, "compares with nothing; give one of at_least, at_most, better_than"),
        ({"metric": "loss.ko", "at_most": 1.0, "at_least": 0.5}, "has at_least and at_most; give one of"),
        ({"metric": "loss.ko", "at_most": 1.0, "by": 0.1}, r"by 0\.1 is for better_than"),
        ({"metric": "loss.ko", "better_than": "x", "by": -1}, "by"),
        ({"metric": "loss.ko", "at_most": math.nan}, r"at_most.*finite"),
        ({"metric": "loss.ko", "better_than": "x", "by": math.inf}, r"by.*finite"),
    ],
)
def test_gates_that_say_nothing_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=rf"gate\.0.*{message}"):
        parse(EvaluateSpec, {"gate": [fields]})


def test_a_failed_gate_holds_the_export_and_a_changed_one_repeats_no_evaluation(tmp_path: Path):
    """What the sentence says, and that only the results of the gates change in eval.json."""
    spec, _ = make_run(tmp_path, evaluate={"max_tokens": 100})
    strict = spec.updated({"evaluate": {"gate": [{"metric": "bits_per_byte.en", "at_most": 0.5}]}})
    with pytest.raises(GateError, match=r"the newest checkpoint has not been evaluated \(train.evaluate.gate\)"):
        export.run(strict)
    result = evaluate.run(strict)
    value = result["domains"]["en"]["bits_per_byte"]
    sentence = f"en bits per byte {value:.4f} is not ≤ 0.5000 (train.evaluate.gate[0])"
    assert result["gates"] == [
        {"metric": "bits_per_byte.en", "at_least": None, "at_most": 0.5, "better_than": None, "by": 0.0}
        | {"passed": False, "value": value, "threshold": 0.5, "sentence": sentence}
    ]
    run_dir = Path(spec.run_dir)
    assert sentence in (run_dir / "report.html").read_text(encoding="utf-8")
    with pytest.raises(GateError) as caught:
        export.run(strict)
    assert str(caught.value) == (
        f"gate: {sentence}; the model was not exported; change the gate or train longer, then yaongi resume micro"
    )
    assert caught.value.code == ExitCode.GATE == 72 and not retryable(caught.value.code)
    assert not (run_dir / "export").exists()

    mild = spec.updated({"evaluate": {"gate": [{"metric": "bits_per_byte.all", "at_most": 99}]}})
    export.run(mild)
    assert (run_dir / "export" / "manifest.json").is_file()
    changed = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    assert changed.pop("gates")[0]["passed"] is True
    result.pop("gates")
    assert changed == result
    gate.refuse(spec)
    assert json.loads((run_dir / "eval.json").read_text(encoding="utf-8")) == result, "no gate is left"


def test_numbers_that_differ_look_different():
    assert gate._shown(1.80000001, 1.8) == ["1.80000001", "1.80000000"]
    assert gate._shown(1.92, 1.8) == ["1.9200", "1.8000"]
