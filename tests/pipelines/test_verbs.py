"""The verbs on runs of this machine, as commands."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_job import small_job

from pipelines import cli

YAONGI = Path(sys.executable).with_name("yaongi")
pytestmark = pytest.mark.timeout(600)


def yaongi(cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1", "KUBECONFIG": os.devnull}
    return subprocess.run([YAONGI, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def good(cwd: Path, *arguments: str | Path) -> str:
    done = yaongi(cwd, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(cwd: Path) -> list[float]:
    (file,) = (cwd / "work/checkpoints/runs").glob("*/logs/metrics.jsonl")
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def test_verbs_on_what_is_not_there_say_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    for verb in ("status", "logs", "stop", "resume"):
        monkeypatch.setattr(sys, "argv", ["yaongi", verb, "nothing"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert tuple(capsys.readouterr()) == ("", "error: no run 'nothing' in work; none is known\n")
    monkeypatch.setattr(sys, "argv", ["yaongi", "status"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == "no runs in work\n"


def test_a_job_that_is_wrong_is_not_started(tmp_path):
    done = yaongi(tmp_path, "local", "tiny", "--set", "train.steps=-1")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "steps" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_background_run_that_is_stopped_and_resumed_trains_as_if_undisturbed(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for place in (undisturbed, disturbed):
        place.mkdir()
        job = small_job(place, steps=200)
        # The same name in both places: what a run computes is in it, and so are its paths.
        job.write_text(job.read_text().replace(f"{place}/", ""))
    good(undisturbed, "run", "small.yaml")

    started = good(disturbed, "local", "small.yaml")
    name = started.split()[1]
    deadline = time.monotonic() + 200
    while "loss  " not in (shown := good(disturbed, "status", "small.yaml")):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert "state       running: in step train" in shown and "/200" in shown
    again = yaongi(disturbed, "local", "small.yaml")
    assert again.returncode == 1 and "is already running as process" in again.stderr
    assert f"stopped {name}; checkpoint saved at step " in good(disturbed, "stop", name)
    assert f"stopped: continue: yaongi resume {name}" in good(disturbed, "status", name)
    assert 0 < len(losses(disturbed)) < 200

    assert f"run {name} runs in the background" in good(disturbed, "resume", name[:8])
    followed = good(disturbed, "logs", name, "--follow")
    assert "✓ summary" in followed and "step 400/200" in followed
    assert f"{name}  here   finished  400/200" in good(disturbed, "status")
    assert "step 400/200" in good(disturbed, "logs", name, "--rank", "0")
    of_evaluate = good(disturbed, "logs", name, "--task", "evaluate")
    assert of_evaluate.startswith("▶ evaluate") and "✓ evaluate" in of_evaluate and "train" not in of_evaluate
    assert losses(disturbed) == losses(undisturbed)
