"""The processes of runs on this machine: find the one that drives a run, start one in the background, stop it.

Each `yaongi run` writes `workdir/processes/<run>.json`, beside the job itself, for people to read, and holds a lock
file while it lives. The lock says whether it is alive; its pid does not, because the kernel reuses pids.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from components.running import one_line
from components.volume import made
from manifests.paths import whole
from manifests.spec import JobSpec, job_file_text
from pipelines.options import again
from pipelines.stopping import ends_at_once
from trainer.errors import LaunchError, VolumeError
from trainer.exitcodes import ExitCode, of_process
from trainer.files import atomic_write
from trainer.specbase import to_stored_yaml

START_PATIENCE_SECONDS = 60
LOOK_PATIENCE_SECONDS = 0.5  # a check whether a run is alive holds its lock for a moment


@dataclass(frozen=True)
class Process:
    """Who drives, or last drove, a run.

    Attributes:
        cwd: relative paths in the job start here.
        started, ended: Unix seconds; `ended` is None while it runs, and stays None if it was killed.
        code, error: exit code and the one-line error.
    """

    run: str
    pid: int
    host: str
    cwd: str
    started: float
    ended: float | None = None
    code: int | None = None
    error: str = ""


def folder(workdir: Path) -> Path:
    return workdir / "processes"


def job_file(workdir: Path, run: str) -> Path:
    """The job as it was started; written before the run directory exists."""
    return folder(workdir) / f"{run}.yaml"


def console_file(workdir: Path, run: str) -> Path:
    """The output of the last background process."""
    return folder(workdir) / f"{run}.out"


def read(workdir: Path, run: str) -> Process | None:
    """None if this workdir has never driven the run."""
    try:
        return Process(**json.loads((folder(workdir) / f"{run}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_alive(workdir: Path, run: str) -> bool:
    try:
        with (folder(workdir) / f"{run}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def driving(job: JobSpec, workdir: Path) -> Iterator[None]:
    """Make this process the only one that drives the run during the block.

    Raises:
        LaunchError: another process drives it.
    """
    run = job.run_name
    made(folder(workdir))
    with _locked(workdir, run):
        me = Process(run, os.getpid(), socket.gethostname(), str(Path.cwd()), time.time())
        atomic_write(job_file(workdir, run), job_file_text(job))
        _write(workdir, me)
        try:
            with ends_at_once():
                yield
        except BaseException as error:
            code = getattr(error, "code", ExitCode.FAULT)
            _write(workdir, replace(me, ended=time.time(), code=int(code or 0), error=one_line(error)))
            raise
        _write(workdir, replace(me, ended=time.time(), code=0))


@contextmanager
def _locked(workdir: Path, run: str) -> Iterator[IO[bytes]]:
    with (folder(workdir) / f"{run}.lock").open("wb") as lock:
        deadline = time.monotonic() + LOOK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _driven(workdir, run) from None
            time.sleep(0.02)
        yield lock


def running(workdir: Path, run: str) -> str:
    """`run … is already running as process … on … since …`."""
    process = read(workdir, run)
    if process is None:
        return f"run {run} is already running as another process"
    since = f"{datetime.fromtimestamp(process.started):%Y-%m-%d %H:%M:%S}"
    return f"run {run} is already running as process {process.pid} on {process.host} since {since}"


def _driven(workdir: Path, run: str) -> LaunchError:
    return LaunchError(f"{running(workdir, run)}; follow it: yaongi logs {run} --follow{again(workdir)}")


def _write(workdir: Path, process: Process) -> None:
    atomic_write(folder(workdir) / f"{process.run}.json", json.dumps(asdict(process), indent=1).encode())


def holder(pid_file: Path) -> int | None:
    """The process that keeps its number in this file now; None if none does, or it is dead."""
    try:
        with pid_file.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = pid_file.read_text(encoding="ascii", errors="replace").strip()
        return int(text) if text.isdecimal() else 0
    except OSError:  # there is none; whoever writes it says what else is wrong
        return None
    return None


@contextmanager
def keeping_number(pid_file: Path | None) -> Iterator[None]:
    """Keep this process's number in a file, which is locked until the block ends and removed then.

    A file without a lock is of a dead process, whatever its number means now.

    Raises:
        LaunchError: a living process has it.
        VolumeError: it cannot be written.
    """
    if pid_file is None:
        yield
        return
    made(pid_file.parent)
    try:
        file = pid_file.open("a+b")
    except OSError as error:
        raise VolumeError(f"--pid-file {pid_file}: cannot be written ({error.strerror}); name another file") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"process {holder(pid_file)} of {pid_file} is still running; end it first: kill {holder(pid_file)}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        try:
            yield
        finally:
            pid_file.unlink(missing_ok=True)


def start(job: JobSpec, workdir: Path, cwd: Path, verbose: bool = False, pid_file: Path | None = None) -> Process:
    """Start `yaongi run` for a job in the background; returns once it drives the run and its log exists.

    It gets its own session, so that closing the terminal or pressing Ctrl-C there does not reach it.

    Args:
        pid_file: a file that has its number while it runs.

    Raises:
        LaunchError: the run already has a process, or the new one ended before its log existed; with reason and code.
    """
    run = job.run_name
    if is_alive(workdir, run):
        raise _driven(workdir, run)
    file, console, former = job_file(workdir, run), console_file(workdir, run), _logs(workdir, run)
    made(folder(workdir))
    atomic_write(file, to_stored_yaml(job))
    places = ["--target", job.cluster.target, "--workdir", str(whole(workdir))]
    places += ["--pid-file", str(whole(pid_file))] if pid_file else []
    command = [sys.executable, "-m", "pipelines.cli", "run", str(whole(file)), *places]
    with console.open("wb") as output:
        child = subprocess.Popen(
            command + (["--verbose"] if verbose else []),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
        )
    deadline = time.monotonic() + START_PATIENCE_SECONDS
    process = None
    while time.monotonic() < deadline:
        ended = child.poll() is not None
        found = read(workdir, run)
        process = found if found is not None and found.pid == child.pid else None
        # Wait for this start's log: whoever looks next must not find the one of an earlier start.
        if ended or (process and _logs(workdir, run) - former):
            break
        time.sleep(0.1)
    if process and (process.ended is None or process.code == 0 or _logs(workdir, run) - former):
        return process
    if process:
        raise LaunchError(process.error or f"run {run} ended before it began", process.code)
    last = (console.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
    code = None if child.returncode is None else of_process(child.returncode)
    raise LaunchError(f"run {run} did not start: {last.removeprefix('error: ')} (output: {console})", code)


def _logs(workdir: Path, run: str) -> set[Path]:
    return set((workdir / "logs").glob(f"{run}-*.log"))


def stop(workdir: Path, run: str, step: Callable[[], str], write: Callable[[str], None]) -> Process:
    """Send SIGTERM to the process of a run, so that the trainer saves a checkpoint, and wait until it has ended.

    Args:
        step: returns the name of the running pipeline step, "" for none.
        write: receives progress messages while this waits.

    Returns:
        How it ended.

    Raises:
        LaunchError: no process drives the run, or it is on another host.
    """
    process = read(workdir, run)
    if process is None or not is_alive(workdir, run):
        raise LaunchError(f"run {run} is not running; see: yaongi status {run}{again(workdir)}")
    if process.host != socket.gethostname():
        raise LaunchError(f"run {run} runs on {process.host}; stop it there (process {process.pid})")
    os.kill(process.pid, signal.SIGTERM)
    told = None
    while is_alive(workdir, run):
        if (now := step()) != told:
            told = now
            saves = ", which saves a checkpoint first" if now == "train" else ""
            write(f"stopping {run} (process {process.pid}); waiting for {f'step {now}' if now else 'it'} to end{saves}")
        time.sleep(0.2)
    return read(workdir, run) or process
