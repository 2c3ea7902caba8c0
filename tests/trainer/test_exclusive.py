"""Only one process group trains in a run directory, even if processes and machines fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import micro
import pytest
from waiting import wait_until

from trainer.errors import LaunchError, VolumeError
from trainer.exitcodes import ExitCode
from trainer.process import exclusive, limits

HOLDER = """
import sys, time
from trainer.process import exclusive
exclusive.RENEWAL_SECONDS = 0.2
exclusive.machine = lambda: sys.argv[2]
with exclusive.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def trained(run_dir: Path, machine: str) -> Iterator[subprocess.Popen]:
    """Another process that trains there until a line is written to it."""
    command = [sys.executable, "-c", HOLDER, str(run_dir), machine]
    with subprocess.Popen(
        command,
        env=micro.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "machine", lambda: "here")
    monkeypatch.setattr(limits, "MISSED_RENEWALS", 100)  # × 0.2 s, until another machine is taken for dead


def test_second_training_is_refused_by_name_and_a_dead_one_holds_nothing(tmp_path: Path):
    for refused in (exclusive.refuse_second, lambda run_dir: ExitStack().enter_context(exclusive.held(run_dir))):
        with trained(tmp_path / "run", "here") as process, exclusive.held(tmp_path / "beside"):
            with pytest.raises(LaunchError, match=rf"being trained by process {process.pid} on \S+ since 2") as error:
                refused(tmp_path / "run")
            assert error.value.code == ExitCode.UNAVAILABLE and "\n" not in str(error.value)
            process.kill()  # without a word
            process.wait()
            exclusive.refuse_second(tmp_path / "run")
            with exclusive.held(tmp_path / "run"):
                pass


def test_holder_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(tmp_path: Path):
    with trained(tmp_path, "there"):
        exclusive.refuse_second(tmp_path)  # it is not for a launcher to wait
        with pytest.raises(LaunchError, match="is being trained by process"), exclusive.held(tmp_path):
            pass


def test_lock_that_a_lost_machine_left_is_taken_over_and_its_process_ends_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """NFS may keep such a lock forever. The holder is suspended, as if its network were gone."""
    monkeypatch.setattr(limits, "MISSED_RENEWALS", 2)
    with trained(tmp_path, "there") as lost:
        os.kill(lost.pid, 19)  # SIGSTOP
        with exclusive.held(tmp_path):
            holder = json.loads((tmp_path / exclusive.FILE).read_bytes())
            assert holder["machine"] == "here" and f"process {os.getpid()} " in holder["holder"]
            os.kill(lost.pid, 18)  # SIGCONT
            assert lost.wait(timeout=60) == ExitCode.UNAVAILABLE
            assert "another process has taken this run over" in lost.stderr.read()
        exclusive.refuse_second(tmp_path)


def test_mount_that_knows_no_locks_of_other_machines_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with trained(tmp_path, "there"):
        monkeypatch.setattr(exclusive.fcntl, "lockf", lambda *_: None)
        with pytest.raises(LaunchError, match="is being trained by process"), exclusive.held(tmp_path):
            pass


def test_holder_that_ended_in_order_is_waited_for_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with trained(tmp_path, "there") as process:
        process.stdin.write("\n")
        process.stdin.flush()
        wait_until(lambda: process.poll() is not None)
    monkeypatch.setattr(exclusive.time, "sleep", lambda _: pytest.fail("waited"))
    with exclusive.held(tmp_path):
        pass


def test_directory_that_cannot_be_locked_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(VolumeError, match="Not a directory; fix the volume") as error,
        exclusive.held(tmp_path / "file" / "run"),
    ):
        pass
    assert error.value.code == ExitCode.VOLUME
