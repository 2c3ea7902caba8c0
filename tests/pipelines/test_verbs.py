"""The verbs on runs of this machine, as commands."""

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from small_job import small_job

from components.plan import feasible
from pipelines import refusals

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch):
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("pipelines.background.START_PATIENCE_SECONDS", 600)  # a busy machine starts slowly


def losses(cwd: Path) -> list[float]:
    (file,) = (cwd / "work/checkpoints/runs").glob("*/logs/metrics.jsonl")
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def test_verbs_on_what_is_not_there_say_so_in_one_line(yaongi):
    for verb in ("status", "logs", "stop", "resume"):
        assert yaongi(verb, "nothing") == (2, "", "error: no run 'nothing' in work; none is known\n")
    assert yaongi("status") == (0, "no runs in work\n", "")


def test_a_job_that_is_wrong_is_not_started(yaongi, tmp_path):
    code, _, error = yaongi("local", "tiny", "--set", "train.steps=-1")
    assert code == 2 and error.startswith("error: ") and "steps" in error
    assert not (tmp_path / "work").exists()


def test_a_job_that_cannot_work_here_is_refused_in_the_foreground_and_its_logs_say_so(yaongi, monkeypatch, tmp_path):
    monkeypatch.setattr(feasible, "_trains_without_gpu", lambda job: True)
    monkeypatch.setattr(feasible, "limit_bytes", lambda: 2**30)
    code, said, error = yaongi("local", "h100-4b")
    assert (code, said) == (2, "") and "without a GPU" in error
    assert not (tmp_path / "work").exists()
    assert yaongi("run", "h100-4b") == (code, said, error)
    code, said, ended = yaongi("logs", "h100-4b")
    assert (code, said) == (69, "") and f"failed: {error.removeprefix('error: ')}" in ended
    (name,) = (path.stem for path in Path("work/processes").glob("*.json"))
    assert yaongi("why", "h100-4b") == (0, f"{name}, on this machine, is failed: {error.removeprefix('error: ')}", "")
    assert yaongi("why", "h100-4b", "--namespace", "mine")[0] == 69
    code, _, error = yaongi("why", "nothing", "--workdir", "w")
    assert code == 69 and error.startswith("error: no run 'nothing' in w") and "no cluster is configured" in error


def test_a_background_process_that_refuses_its_job_is_no_start(yaongi, monkeypatch, tmp_path):
    """What only it can see, or what changed meanwhile."""
    monkeypatch.setattr(refusals, "refuse", lambda job, changes: None)
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        taken = f"train.runtime.metrics_port={busy.getsockname()[1]}"
        code, said, error = yaongi("local", "tiny", "--set", taken)
    assert (code, said) == (2, "") and "is taken" in error


@pytest.mark.slow
def test_a_background_run_that_is_stopped_and_resumed_trains_as_if_undisturbed(yaongi, tmp_path, monkeypatch):
    def good(*arguments: str) -> str:
        code, said, error = yaongi(*arguments)
        assert code == 0, said + error
        return said

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for place in (undisturbed, disturbed):
        place.mkdir()
        job = small_job(place, steps=300, checkpoint={"every_steps": 1000})  # except the one that the stop saves
        # The same name in both places: what a run computes is in it, and so are its paths.
        job.write_text(job.read_text().replace(f"{place}/", ""))
    monkeypatch.chdir(undisturbed)
    good("run", "small.yaml")

    monkeypatch.chdir(disturbed)
    name = good("local", "small.yaml").split()[1]
    deadline = time.monotonic() + 600
    while "loss  " not in (shown := good("status", "small.yaml")):
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)
    assert "state       running: in step train" in shown and "/300" in shown
    code, _, error = yaongi("local", "small.yaml")
    assert code == 69 and "is already running as process" in error
    assert f"stopped {name}; checkpoint saved at step " in good("stop", name)
    assert f"stopped: continue: yaongi resume {name}" in good("status", name)
    assert 0 < len(losses(disturbed)) < 300

    assert f"run {name} runs in the background" in good("resume", name[:8])
    followed = good("logs", name, "--follow")
    assert "✓ export" in followed and "step 300/300" in followed
    assert re.search(rf"{name} +here +finished +300/300 ", good("status"))
    assert "step 300/300" in good("logs", name, "--rank", "0")
    of_evaluate = good("logs", name, "--task", "evaluate")
    assert of_evaluate.startswith("▶ evaluate") and "✓ evaluate" in of_evaluate and "train" not in of_evaluate
    assert losses(disturbed) == losses(undisturbed)
