"""`yaongi status`, `logs`, `why` and `stop` on runs of a real Kubeflow Pipelines: green, running, stopped, stuck."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import backend
import pytest
from backend import Run, form, kubectl, wait_for, workers, yaongi

from components.cluster import state
from pipelines.runs.kfp import steppods

pytestmark = [pytest.mark.e2e_kfp, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def training(create, first: Run, name: str) -> Iterator[tuple[Run, str]]:
    """A run that trains for long unless it is stopped, after its first checkpoint; with the beginning of its job's
    name."""
    job = f"{name}l"
    run = create("long", form(job, 16_000, {}))
    wait_for("its workers", lambda: workers(job), 600)
    wait_for("its first checkpoint", lambda: "published" in asked("logs", run, "--task", "train", code=None), 300)
    yield run, job
    if run.state not in backend.ENDED:
        run.terminate()


def asked(verb: str, run: Run, *options: str, code: int | None = 0) -> str:
    """What a verb prints about a run."""
    done = yaongi(verb, run.id, "--host", backend.HOST, *options)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(said: str) -> dict[str, str]:
    """The lines of `status` by their first word."""
    return {words[0]: words[1] for line in said.splitlines() if len(words := line.split(maxsplit=1)) == 2}


def test_a_green_run_shows_steps_loss_and_checkpoint_and_its_log(first: Run, name: str) -> None:
    shown = rows(asked("status", first))
    assert shown["state"] == "succeeded" and shown["step"] == "8/8" and shown["checkpoint"].startswith("step 8")
    assert re.match(r"\d\.\d+ ", shown["loss"])
    for step in ("plan", "data", "train", "evaluate", "export", "cleanup"):
        assert re.match(r"succeeded +0:\d\d:\d\d ", shown[step]), (step, shown[step])
    log = asked("logs", first, "--task", "train")
    assert log.startswith("▶ train\n") and "step 8/8  loss" in log and "KFP Executor" not in log
    assert log in asked("logs", first)
    listed = yaongi("status", "-n", backend.NAMESPACE)
    (row,) = (line for line in listed.stdout.splitlines() if line.strip().startswith(f"{name}-"))
    assert " succeeded " in row and " 8/8 " in row and "step 8, " in row, row


def test_a_running_run_shows_how_far_it_is(training: tuple[Run, str]) -> None:
    shown = rows(asked("status", training[0]))
    assert shown["state"] == "running" and shown["train"].startswith("running ") and shown["cleanup"] == "waiting"
    assert re.match(r"\d+/16,000$", shown["step"]) and shown["checkpoint"].startswith("step ")
    code = yaongi("logs", training[0].id, "--host", backend.HOST, "--task", "evaluate")
    assert code.returncode == 69 and code.stderr == "error: step evaluate has no log: it is waiting\n"


def test_stop_returns_when_no_worker_is_left_and_the_checkpoint_is_there(training: tuple[Run, str]) -> None:
    run, job = training
    said = asked("stop", run)
    assert workers(job) == [], said
    ours = json.loads(kubectl("get", "pods", "-l", f"{steppods.WORKFLOW_LABEL}={workflow(run)}", "-o", "json"))["items"]
    assert [pod["metadata"]["name"] for pod in ours if not state.is_over(pod)] == []
    print(said)
    assert f"run {run.id} is stopped; nothing of it runs any more (" in said
    assert int(re.search(r"the newest checkpoint is of step (\d+)", said)[1]) > 0
    shown = rows(asked("status", run))
    assert shown["state"] == "stopped: submit its job again to continue" and shown["train"].startswith("stopped ")
    assert " is stopped: submit its job again" in asked("why", run)


def test_an_absent_image_of_the_steps_is_told_and_stop_does_not_wait_for_it(create, name: str) -> None:
    run = create("no-image", form(f"{name}a", 8, {}, image="localhost/absent-pipeline:9.9.9"))
    wait_for("the reason", lambda: "cannot be pulled" in asked("why", run), 200)
    said = asked("why", run)
    assert "plan image 'localhost/absent-pipeline:9.9.9' cannot be pulled (" in said
    assert "check --image (in the form: image): a localhost/ image is served by no registry" in said
    said = asked("stop", run)
    print(said)
    assert " nothing of it runs any more (" in said and "cleanup did not run" in said


def workflow(run: Run) -> str:
    """Name of a run's workflow, from its pods' names."""
    return run.pods[0]["id"].rpartition("-")[0]
