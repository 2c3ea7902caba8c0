"""A stop works at any time: before the first step, between two, while one runs; a second one acts at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from components import running
from manifests.spec import job_from
from pipelines import background, execute, pretrain, stopping
from pipelines.runs.local import LocalRun

# Prints the signals that it receives, and is not ended by them. It does not pause for them: it would not see one that
# came just before, until the next.
STUBBORN = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.write(1, b"%d\\n" % number))
os.write(1, b"ready\\n")
while True:
    time.sleep(0.1)
"""


def stubborn() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_each_signal_has_more_force_and_is_acknowledged_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    stop = stopping.Stop(tmp_path)
    with stubborn() as child, stop.handled():
        assert child.stdout.readline() == "ready\n"
        stop.reaches(child)
        for passed_on in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGINT)
            assert child.stdout.readline() == f"{passed_on}\n"
        os.kill(os.getpid(), signal.SIGINT)
        assert child.wait() == -signal.SIGKILL
    assert stop.received == [signal.SIGINT] * 3
    assert capfd.readouterr().out == "".join(stopping.SAID)


def test_what_came_before_the_child_reaches_it(tmp_path: Path):
    stop = stopping.Stop(tmp_path)
    with stop.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        with stubborn() as child:
            assert child.stdout.readline() == "ready\n"
            stop.reaches(child)
            assert child.stdout.readline() == f"{signal.SIGTERM}\n"
            child.kill()


def test_no_step_begins_after_a_stop_but_the_one_that_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop = stopping.Stop(tmp_path)
    for name, value in stop.environment.items():
        monkeypatch.setenv(name, value)
    begun: list[str] = []
    with stop.handled():
        with running.step("download"):
            begun.append("download")
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as end, running.step("tokenizer"):
            begun.append("tokenizer")
        with running.step("cleanup"):
            begun.append("cleanup")
    assert begun == ["download", "cleanup"] and end.value.code == 130


def test_a_stop_while_the_pipelines_process_imports_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stop").write_text(str(int(signal.SIGTERM)))
    (tmp_path / "arguments.json").write_text(json.dumps({}))
    monkeypatch.setenv(running.STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    monkeypatch.setattr(sys, "argv", ["execute", str(tmp_path / "arguments.json"), str(tmp_path)])
    monkeypatch.setattr(pretrain, "pretrain", lambda **_: pytest.fail("it began"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert execute.main() == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> LocalRun:
    storage = {"datasets_dir": str(tmp_path / "d"), "checkpoints_dir": str(tmp_path / "checkpoints")}
    job = job_from({"preset": "tiny"}, {"name": "stops", "storage": storage})
    return LocalRun(job.run_name, tmp_path / "checkpoints" / "runs" / job.run_name, tmp_path)


# After a stop, it ends when its input does: not before the one who stops it has looked.
DRIVER = """
import sys, time
from pathlib import Path
from manifests.spec import job_from
from pipelines import background
storage = {"datasets_dir": sys.argv[1] + "/d", "checkpoints_dir": sys.argv[1] + "/checkpoints"}
job = job_from({"preset": "tiny"}, {"name": "stops", "storage": storage})
with background.driving(job, Path(sys.argv[1])):
    try:
        print("up", flush=True)
        while True:
            time.sleep(0.1)
    finally:
        sys.stdin.readline()
"""


def test_a_stop_before_the_pipeline_is_recorded_and_said(run: LocalRun):
    said: list[str] = []
    command = [sys.executable, "-c", DRIVER, str(run.workdir)]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL

    def tell(line: str) -> None:
        said.append(line)
        process.stdin.close()

    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True) as process:
        assert process.stdout.readline() == "up\n"
        ended = background.stop(run.workdir, run.name, lambda: "train", tell)
    wait_until(lambda: not background.is_alive(run.workdir, run.name))
    assert ended.code == 143 and run.view().state == "stopped"
    expected = (
        f"stopping {run.name} (process {process.pid}); waiting for step train to end, which saves a checkpoint first"
    )
    assert said == [expected]
