"""Which run a user means, its progress, and which process drives it."""

import fcntl
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from components.launch.step import numbers_of
from manifests.spec import load_job
from pipelines import background
from pipelines.runs import cluster, local, names, protocol, standing
from pipelines.runs.kfp.run import KfpRun
from trainer.data.manifest import StageResult
from trainer.errors import LaunchError
from trainer.files import atomic_write
from trainer.recording.trackers import state
from trainer.specbase import SpecError, to_yaml


@pytest.mark.parametrize("place", [local.LocalRun, cluster.ClusterRun, KfpRun])
def test_every_place_has_every_operation_of_a_run(place):
    operations = [name for name, each in vars(protocol.Run).items() if callable(each) and not name.startswith("_")]
    assert {"view", "show_logs", "stop", "resume", "why"} <= {*operations}
    for name in operations:
        assert inspect.signature(getattr(place, name)) == inspect.signature(getattr(protocol.Run, name)), name


NAMES = ["tiny-aaaa1111", "tiny-aaaa2222", "ko-33334444"]


def test_a_run_is_found_by_name_and_by_the_beginning_that_only_it_has():
    assert names.choose("ko", NAMES, "here") == "ko-33334444"
    assert names.choose("tiny-aaaa2222", NAMES, "here") == "tiny-aaaa2222"
    assert names.choose("tiny", NAMES, "here", exactly="tiny-aaaa1111") == "tiny-aaaa1111"


def test_what_could_be_several_runs_or_none_lists_candidates():
    with pytest.raises(SpecError, match=r"^'tiny-' is the beginning of several runs: tiny-aaaa1111, tiny-aaaa2222;"):
        names.choose("tiny-", NAMES, "here")
    with pytest.raises(SpecError, match=r"^no run 'tyni' in work; known: ko-33334444, tiny-aaaa1111, tiny-aaaa2222$"):
        names.choose("tyni", NAMES, "in work")
    with pytest.raises(SpecError, match=r"and 2 more$"):
        names.choose("z", [f"run-{number}" for number in range(10)], "in work")


@pytest.fixture
def job(tmp_path):
    return load_job("tiny", {"storage": {"checkpoints_dir": str(tmp_path / "checkpoints")}, "train": {"steps": 500}})


@pytest.fixture
def run(job, tmp_path):
    """A run with the directory that the launcher prepares before the trainer starts."""
    found = local.LocalRun(job.run_name, tmp_path / "checkpoints/runs" / job.run_name, tmp_path)
    found.directory.mkdir(parents=True)
    atomic_write(found.directory / "job.yaml", to_yaml(job).encode())
    atomic_write(found.directory / "train.yaml", to_yaml(job.train_spec()).encode())
    return found


def test_a_run_is_found_by_its_directory_preset_or_job_file_and_keeps_its_name(run, job, tmp_path):
    for text in (str(run.directory), job.run_name, str(run.directory / "job.yaml")):
        assert local.find(text, tmp_path).name == job.run_name
    assert local.find(job.run_name, tmp_path).job() == job


def test_what_lies_beside_the_runs_is_none_of_them(run, tmp_path):
    root = run.directory.parent
    for name in ("lost+found", ".snapshot", ".Trash-1000"):
        (root / name).mkdir()
    for name in (".DS_Store", ".nfs000000001", "notes.txt"):
        (root / name).touch()
    background.folder(tmp_path).mkdir()
    (background.folder(tmp_path) / "._other.json").write_bytes(b"\0\5\x16\7")
    assert list(local.local_runs(tmp_path)) == [run.name]


def test_relative_paths_of_a_stored_job_start_where_it_was_started(run, job):
    file = run.directory / "job.yaml"
    assert run.job().storage.sources_dir is None
    stored = job.updated({"storage": {"sources_dir": "/of/the/job"}})
    file.write_text(to_yaml(stored))
    assert run.job() == stored
    value = yaml.safe_load(to_yaml(job))
    assert "sources_dir" not in value["storage"]  # as before there was such a field
    file.write_text(yaml.safe_dump(value))
    assert run.job() == job


def test_numbers_come_from_the_run_directory(run):
    (run.directory / "logs").mkdir()
    lines = [{"step": n, "loss": 5 - n / 100, "seconds": 2.0, "tokens_per_second": 50.0} for n in range(1, 101)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 101, "lo'
    (run.directory / "logs/metrics.jsonl").write_text(text)
    (run.directory / "checkpoints").mkdir()
    marker = run.directory / "checkpoints/LATEST"
    marker.write_text("step-00000080\n")
    hour_ago = datetime.now().timestamp() - 3600
    os.utime(marker, (hour_ago, hour_ago))
    found = standing.of_directory(run.directory)
    assert (found.step, found.steps, found.loss, found.tokens_per_second) == (100, 500, pytest.approx(4.045), 50.0)
    assert found.loss_steps == 10
    assert found.left == timedelta(seconds=800)
    assert found.checkpoint_step == 80 and 3599 < found.checkpoint_age < 3610
    assert found.checkpoint.startswith("step 80, 1:00:0")


def test_a_checkpoint_of_a_course_that_was_given_up_is_not_shown(run):
    """As after a resume with more steps, until the first checkpoint of the longer run."""
    (run.directory / "logs").mkdir()
    line = {"step": 109, "loss": 5.0, "seconds": 2.0, "tokens_per_second": 50.0}
    (run.directory / "logs/metrics.jsonl").write_text(json.dumps(line) + "\n")
    for step in (80, 120):
        (run.directory / f"checkpoints/step-{step:08}").mkdir(parents=True)
    (run.directory / "checkpoints/LATEST").write_text("step-00000120\n")
    found = standing.of_directory(run.directory)
    assert (found.step, found.checkpoint_step) == (109, 80) and found.checkpoint_age < 60
    (run.directory / "checkpoints/step-00000080").rmdir()
    assert standing.of_directory(run.directory).checkpoint_step is None


def test_numbers_come_from_the_log_where_the_volume_is_out_of_reach():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    lines = [
        "2026-01-01T11:58:00.5Z step 10/500  loss 6.1000  grad 1.0  lr 1.00e-02  9 tokens/s  ETA 1:00:00",
        "2026-01-01T11:58:30.123456789Z checkpoint of step 10 published after 0.5 s",
        "2026-01-01T11:59:00Z step 12/500  loss 6.0500  grad 1.0  lr 1.00e-02  1,234 tokens/s  ETA 2 days, 3:04:05"
        "  (skipped: nonfinite)",
        "2026-01-01T11:59:01Z a line of something else",
    ]
    found = standing.of_log(lines, now)
    assert (found.step, found.steps, found.loss, found.tokens_per_second) == (12, 500, 6.05, 1234.0)
    assert found.left == timedelta(days=2, hours=3, minutes=4, seconds=5)
    assert found.checkpoint_step == 10 and found.checkpoint_age == pytest.approx(89.9, abs=0.1)


def test_numbers_come_from_a_step_that_launches_a_training_also_if_it_was_done_before(capsys):
    lines = [
        "launcher: job x is running",
        "step 12/500  loss 6.0500  grad 1.0  lr 1.00e-02  1,234 tokens/s  ETA 0:00:05",
    ]
    found = standing.of_lines([*lines, "checkpoint of step 10 published after 0.5 s"])
    assert (found.step, found.steps, found.loss, found.checkpoint_step, found.checkpoint_age) == (
        12,
        500,
        6.05,
        10,
        None,
    )
    done = StageResult(kind="train", path="x", digest="0" * 64, summary={"steps": 500, "loss_last": 5.4321})
    print(f"train: unchanged and verified, nothing to do{numbers_of(done)}")
    found = standing.of_lines(capsys.readouterr().out.splitlines())
    assert (found.step, found.steps, found.loss, found.checkpoint_step) == (500, 500, 5.4321, 500)


def test_the_lines_read_are_those_that_the_recorder_writes():
    """The trainer's own format strings, filled."""
    source = (Path(standing.__file__).parents[2] / "trainer/recording/recorder.py").read_text()
    step, saved = (re.search(rf'"({start} .*)"', source)[1] for start in ("step %d/%d", "checkpoint of step %d"))
    values = (3, 1000, float("nan"), 1.0, 1e-3, "1,000", timedelta(seconds=61), "  answers 33%", "")
    lines = [f"2026-01-01T11:59:00Z {text}" for text in (step % values, saved % (2, 0.1))]
    found = standing.of_log(lines, datetime.now(UTC))
    assert (found.step, found.left, found.checkpoint_step) == (3, timedelta(seconds=61), 2)


def test_only_one_process_drives_a_run_and_how_it_ended_is_kept(job, run, tmp_path):
    second = background.driving(job, tmp_path)
    with pytest.raises(LaunchError, match="no disk"), background.driving(job, tmp_path):
        assert background.is_alive(tmp_path, job.run_name)
        assert run.view().state == "running"
        with pytest.raises(LaunchError, match=rf"already running as process {os.getpid()} on .*; follow it:"), second:
            pass
        raise LaunchError("no disk\nleft")
    assert not background.is_alive(tmp_path, job.run_name)
    shown = run.view()
    assert (shown.state, shown.why) == ("failed", "no disk; left")
    with background.driving(job, tmp_path):
        pass
    assert run.view().state == "finished"


def test_a_run_that_is_tuned_is_driven_by_the_run_whose_job_tunes_it(job, run, tmp_path, monkeypatch):
    chat = {"licence": "MIT", "origin": {"kind": "files", "paths": ["sample://chat.jsonl.gz"]}}
    tunes = job.updated({"tune": {"steps": 3, "sources": {"chat": chat}}})
    assert tunes.run_name == run.name
    tuned = local.LocalRun(tunes.tuning().run_name, run.directory.parent / tunes.tuning().run_name, tmp_path)
    (tuned.directory / "checkpoints").mkdir(parents=True)
    stopped = []
    monkeypatch.setattr(
        background, "stop", lambda workdir, name, *_: stopped.append(name) or background.read(workdir, name)
    )
    with background.driving(tunes, tmp_path):
        shown = tuned.view()
        assert (shown.state, shown.why) == ("running", f"in step tune of {run.name}")
        with pytest.raises(LaunchError, match=rf"already running, in step tune of {run.name}; follow it: yaongi logs"):
            tuned.resume([], print)
        assert f"stopped {run.name}" in tuned.stop(print) and stopped == [run.name]
    assert tuned.view().state == "idle"
    with pytest.raises(LaunchError, match="no disk"), background.driving(tunes.tuning(), tmp_path):
        raise LaunchError("no disk")
    assert tuned.view().state == "failed"
    (tuned.directory / "export").mkdir()
    for name in ("result.json", "export/manifest.json"):  # as the other run writes them later
        (tuned.directory / name).write_text("{}")
        os.utime(tuned.directory / name, (later := datetime.now(UTC).timestamp() + 9, later))
    assert tuned.view().state == "finished"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(yaongi, run, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    other = run.directory.parent / "other-0123abcd"
    other.mkdir()
    (other / "train.yaml").write_text("steps: many\n")
    code, output, _ = yaongi("status", "--workdir", str(tmp_path))
    assert code == 0 and re.search(rf"{run.name} +here +idle", output)
    assert re.search(r"other-0123abcd +here +unreadable", output) and "steps: a whole number is wanted" in output


def test_somebody_who_just_looks_keeps_nobody_from_driving_a_run(job, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "LOOK_PATIENCE_SECONDS", 60)  # on a busy machine the look takes its time
    with background.driving(job, tmp_path):
        pass
    with (tmp_path / "processes" / f"{job.run_name}.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as `background.is_alive` does
        threading.Timer(0.1, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        with background.driving(job, tmp_path):
            assert background.is_alive(tmp_path, job.run_name)


def test_a_run_that_ends_while_it_is_looked_at_does_not_look_killed(job, run, tmp_path, monkeypatch):
    read = background.read
    with ExitStack() as block:
        block.enter_context(background.driving(job, tmp_path))

        def read_before_its_end(*which):
            found = read(*which)
            block.close()
            return found

        monkeypatch.setattr(background, "read", read_before_its_end)
        assert run.view().state == "running"
    monkeypatch.undo()
    assert run.view().state == "finished"


def test_a_process_that_was_killed_is_told_from_one_that_was_stopped(job, run, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from manifests.spec import load_job; "
        "from pipelines import background\n"
        "with background.driving(load_job(sys.argv[1]), Path(sys.argv[2])): print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(run.directory / "job.yaml"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        assert background.read(tmp_path, job.run_name).pid == process.pid
        process.send_signal(signal.SIGKILL)
    shown = run.view()
    assert shown.state == "killed" and f"continue: yaongi resume {job.run_name}" in shown.why
    with pytest.raises(LaunchError, match="is not running; see: yaongi status"):
        background.stop(tmp_path, job.run_name, str, print)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"runtime": {"metrics_port": -1}}}, "is taken"),
        ({"storage": {"datasets_dir": "/dev/null/x"}}, "/dev/null/x cannot be written here"),
    ],
)
def test_a_start_that_is_refused_is_told_with_its_code(yaongi, run, changes, said):
    """Also by `resume`, whose job could run when it was begun; before and after its process counts as the run's."""
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        if "train" in changes:
            changes["train"]["runtime"]["metrics_port"] = busy.getsockname()[1]
        wrong = run.job().updated({"cluster": {"target": "local"}, **changes})
        atomic_write(run.directory / "job.yaml", to_yaml(wrong).encode())
        code, printed, error = yaongi("resume", run.name, "--workdir", str(run.workdir))
    assert (code, printed) == (2, "")
    assert said in error and error.count("\n") == 1


def test_the_run_s_pages_at_trackers_are_shown(yaongi, run):
    page = "http://m:5000/#/experiments/1/runs/2"
    state.State(places={"mlflow": state.Place(id="2", url=page)}).write(run.directory)
    assert ("MLflow", page) in run.view().rows
    _, printed, _ = yaongi("status", run.name, "--workdir", str(run.workdir))
    assert f"MLflow      {page}\n" in printed
