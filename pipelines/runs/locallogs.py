"""The log of a run of this machine: read its current step from it, and show it as `yaongi run` does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from components.marks import DONE, FAILED, MOVED, STARTED
from pipelines import background
from pipelines.background import Process
from pipelines.progress import Watcher
from pipelines.runs.protocol import Run
from trainer.errors import LaunchError

POLL_SECONDS = 0.5


def newest(workdir: Path, run: str) -> Path | None:
    """The full log of the run's last start."""
    logs = (workdir / "logs").glob(f"{run}-*.log")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


def present_step(process: Process | None, log: Path | None) -> str:
    """The running step that started last."""
    running: list[str] = []
    for text in _of_start(process, log):
        if text.startswith(STARTED):
            running.append(text.removeprefix(STARTED))
        elif text.startswith(DONE) and (name := text.removeprefix(DONE).rpartition(" (")[0]) in running:
            running.remove(name)
    return running[-1] if running else ""


def moved_port(process: Process | None, log: Path | None) -> str:
    """The port where the running step serves its metrics, and why, if it is not the usual one; else ""."""
    moved = [text.removeprefix(MOVED) for text in _of_start(process, log) if text.startswith(MOVED)]
    return moved[-1] if moved else ""


def _of_start(process: Process | None, log: Path | None) -> list[str]:
    """Lines of the current start's log; [] if the log is of an earlier start."""
    if log is None or (process and log.stat().st_mtime < process.started):
        return []
    return [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]


def show(
    run: Run, directory: Path, workdir: Path, console: Console, *, follow: bool, rank: int | None, task: str
) -> None:
    """Print the newest log.

    Args:
        rank: show the trainer log of this rank instead of the pipeline's log.
        task: only this step of the pipeline; "" for all.

    Raises:
        LaunchError: there is no such log.
    """
    log, still = newest(workdir, run.name), lambda: follow and background.is_alive(workdir, run.name)
    if rank is None and log is None and not task:
        rank = 0  # the trainer was started alone, without the pipeline
    if rank is not None:
        if task not in ("", "train"):
            raise LaunchError(f"{task} is one process; leave out --rank")
        file = directory / "logs" / f"rank-{rank}.log"
        if not file.is_file():
            ranks = sorted(path.stem for path in file.parent.glob("rank-*.log"))
            if ranks:
                raise LaunchError(f"{file} does not exist; there are logs of: {', '.join(ranks)}")
            now = run.view()
            raise LaunchError(
                f"no rank of {run.name} has written a log; its state is {now.state}: {now.why}".rstrip(": ")
            )
        for line in _lines(file, still):
            print(line, end="", flush=True)
        return
    if log is None:
        raise LaunchError(f"{workdir / 'logs'} holds no log of {run.name}; it was not started from there")
    lines = _lines(log, still)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        watcher = Watcher(console, nowhere, verbose=bool(os.environ.get("YAONGI_VERBOSE")))
        watcher.follow(_of_step(lines, task) if task else lines)
    if watcher.failure:
        console.print(f"error: {watcher.failure}", style="red", markup=False, highlight=False, soft_wrap=True)


def show_beginning(run: str, workdir: Path, console: Console, seconds: float) -> None:
    """Show what the log of a run that has just started says within this time, or until the run ends."""
    log, end = newest(workdir, run), time.monotonic() + seconds
    if log is None:
        return
    lines = _lines(log, lambda: background.is_alive(workdir, run) and time.monotonic() < end)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        Watcher(console, nowhere, verbose=bool(os.environ.get("YAONGI_VERBOSE"))).follow(lines)


def _lines(file: Path, still: Callable[[], bool]) -> Iterator[str]:
    """Whole lines of a file, waiting for more while `still` returns True."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        part = ""
        while True:
            alive = still()  # asked before reading, so that no line is missed
            for text in stream:
                part += text
                if part.endswith("\n"):
                    yield part
                    part = ""
            if not alive:
                break
            time.sleep(POLL_SECONDS)
        if part:
            yield part


def _of_step(lines: Iterator[str], name: str) -> Iterator[str]:
    inside = False
    for line in lines:
        text = line.strip()
        inside = inside or text == f"{STARTED}{name}"
        if inside:
            yield line
        failed = FAILED.fullmatch(text)
        if text.startswith(f"{DONE}{name} (") or (failed and failed["message"].startswith(f"{name}: ")):
            inside = False
