"""The pipeline on a real Kubeflow Pipelines: uploaded, filled in, green; repeated; red in `plan`; terminated."""

from __future__ import annotations

import json
import subprocess

import backend
import pytest
from backend import OF_THIS_SESSION, Run, answer, form, jobs, wait_for, workers, yaongi

pytestmark = [pytest.mark.e2e_kfp, pytest.mark.timeout(1800)]
IN_ORDER = ["plan", "data", "train", "evaluate", "export", "cleanup"]


def test_a_run_from_the_form_is_green_and_its_steps_are_the_users(first: Run, name: str) -> None:
    tasks = [task for task in dict.fromkeys(map(backend.task_of, first.pods)) if task]
    assert tasks == ["plan", "data", "encode", "shards", *IN_ORDER[2:]]
    assert "encode 1/2" in first.logs["encode"] and "encode 2/2" in first.logs["encode"]
    assert "units were done before" in first.logs["shards"]
    for step in ("volumes", "download", "hygiene", "tokenizer"):
        assert f"✓ {step} (" in first.logs["data"], first.logs["data"]
    assert "launcher: created job" in first.logs["train"] and "step 8/8" in first.logs["train"]
    assert workers(name) == [], "a run that has ended left workers"


def test_the_same_job_again_does_nothing_in_as_few_pods_as_its_parts_allow(first: Run, name: str) -> None:
    fields = form(name, 8, OF_THIS_SESSION)
    sets = json.loads(fields["overrides"])
    arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    arguments += [
        "--set",
        "train.steps=8",
        "--set",
        "cluster.nodes=1",
        "--set",
        f"cluster.image={backend.TRAINER_IMAGE}",
    ]
    before = {job["metadata"]["uid"] for job in jobs(name)}
    done = yaongi("submit", "tiny", "--host", backend.HOST, "--image", backend.PIPELINE_IMAGE, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = answer("/apis/v2beta1/runs?sort_by=created_at%20desc&page_size=20")["runs"]
    again = Run(next(run["run_id"] for run in latest if run["display_name"].startswith(f"{name}-")))
    again.show()
    assert [task for task in map(backend.task_of, again.pods) if task] == IN_ORDER
    assert len(again.pods) == 16
    for step in ("train", "evaluate", "export"):
        assert f"{step}: unchanged and verified, nothing to do" in again.logs[step]
    assert {job["metadata"]["uid"] for job in jobs(name)} <= before, "it launched a job"


def test_what_cannot_run_is_red_in_plan_with_the_reason(red: dict[str, tuple[Run, str]]) -> None:
    for case, (run, reason) in red.items():
        assert run.ended(900) == "FAILED", case
        tasks = [task for task in map(backend.task_of, run.pods) if task]
        assert tasks == ["plan", "cleanup"], f"{case}: {tasks}"
        (line,) = (line for line in run.logs["plan"].splitlines() if line.startswith("error "))
        assert reason in line and ": plan: " in line, line


def test_terminate_leaves_nothing_running(create, first: Run, name: str) -> None:
    run = create("stopped", form(f"{name}s", 4000, OF_THIS_SESSION))
    wait_for("its workers", lambda: workers(f"{name}s"), 900)
    wait_for("its first checkpoint", lambda: "checkpoint" in _log(f"{name}s"), 600)
    run.terminate()
    wait_for("the last worker to end", lambda: not workers(f"{name}s"), 180)
    assert run.ended(600) in ("FAILED", "CANCELED")
    assert workers(f"{name}s") == []


def _log(job: str) -> str:
    """What the job's worker has written; "" before it has started."""
    (pod,) = workers(job)
    try:
        return backend.kubectl("logs", pod, "--tail=200")
    except subprocess.CalledProcessError:
        return ""
