"""Gates of a job: refused before the training where they cannot be decided, and enforced by the launcher after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_launch_step import job_for, launched, leave_evaluation, leave_export, leave_training  # noqa: F401 - a fixture

from components.gates import check
from components.launch.step import run
from components.plan.step import runnable_here
from manifests.spec import JobSpec
from trainer.errors import GateError
from trainer.fields import stored
from trainer.specbase import SpecError, parse

SENTENCE = r"gate: ko bits per byte 2.5000 is not ≤ 1.8000 \(train.evaluate.gate\[0\]\); the model was not exported; "


def gated(tmp_path: Path, *gates: dict[str, Any], **evaluate: Any) -> JobSpec:
    return job_for(tmp_path, train={"steps": 4, "evaluate": {"gate": list(gates), **evaluate}})


def test_gates_that_nothing_will_decide_are_refused_in_one_line_each(tmp_path: Path):
    base = {"metric": "loss.ko", "better_than": "base-1"}
    unknown = {"metric": "benchmarks.hellaswag.acc", "at_least": 0.3}
    job = gated(tmp_path, base, unknown, {"metric": "loss.all", "at_most": 3})
    with pytest.raises(SpecError) as caught:
        runnable_here(job)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    file = tmp_path / "checkpoints" / "runs" / "base-1" / "eval.json"
    assert lines[0].startswith(f"train.evaluate.gate[0]: better_than base-1: {file} is not there; evaluate that run")
    said = "metric benchmarks.hellaswag.acc: train.evaluate asks for no such task; it asks for none"
    assert lines[1] == f"train.evaluate.gate[1]: {said}"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"domains": {"ko": {"loss": 3.0}}}))
    tasks = {"tasks": [{"task": "hellaswag"}]}
    check(gated(tmp_path, base, unknown, **tasks))


def test_relative_baselines_start_in_the_folder_of_the_job_file(tmp_path: Path):
    job = gated(tmp_path, {"metric": "loss.ko", "better_than": "old/eval.json"})
    beside = parse(JobSpec, stored(job) | {"storage": stored(job.storage) | {"sources_dir": "/jobs"}})
    assert beside.train_spec().evaluate.gate[0].better_than == "/jobs/old/eval.json"


def test_a_failed_gate_ends_the_evaluation_and_holds_the_export(
    tmp_path: Path,
    launched: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("trainer.gate._show_again", lambda run_dir: None)  # this evaluation has no more than gates need
    job = gated(tmp_path, {"metric": "bits_per_byte.ko", "at_most": 1.8})
    digest = leave_training(job)
    launched.effects["evaluate"] = lambda job: leave_evaluation(job, digest)
    launched.effects["export"] = lambda job: leave_export(job, digest)
    trained = run(job, "train")
    for _ in range(2):
        with pytest.raises(GateError, match=SENTENCE + f"change .*yaongi resume {job.run_name}$"):
            run(job, "evaluate", trained)
    with pytest.raises(GateError, match=SENTENCE):
        run(job, "export")
    assert launched == ["evaluate"], "evaluated once, not exported"
    milder = gated(tmp_path, {"metric": "bits_per_byte.ko", "at_most": 2.5})
    assert milder.run_name == job.run_name
    run(milder, "export", run(milder, "evaluate", trained))
    assert launched == ["evaluate", "export"], "what changed is only the gate"


def test_a_tuned_model_has_gates_of_its_own(tmp_path: Path):
    origin = {"kind": "files", "paths": ["sample://chat.jsonl.gz"]}
    tune = {"steps": 2, "sources": {"chat": {"licence": "CC0-1.0", "origin": origin}}}
    gates = [{"metric": "loss.en", "at_most": 4.0}]
    job = job_for(
        tmp_path, tune=tune | {"gate": gates}, train={"evaluate": {"gate": [{"metric": "loss.ko", "at_most": 9}]}}
    )
    assert [gate.metric for gate in job.tuning().train.evaluate.gate] == ["loss.en"]
    runnable_here(job)
    wrong = job_for(tmp_path, tune=tune | {"gate": [{"metric": "loss.ko", "at_most": 4.0}]})
    with pytest.raises(SpecError, match=r"no source has domain ko; there are en"):
        runnable_here(wrong)
