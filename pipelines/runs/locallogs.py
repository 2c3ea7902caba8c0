"""Show what a run of this machine has printed, as `yaongi run` shows it, or one rank's own file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from components.marks import DONE, FAILED, STARTED
from pipelines import background
from pipelines.progress import Watcher
from pipelines.runs.local import Run
from pipelines.runs.view import newest_log, of_local
from trainer.errors import LaunchError

POLL_SECONDS = 0.5


def show(run: Run, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
    """Print the newest log.

    Args:
        rank: that rank's file of the training instead of the pipeline's log.
        task: only this step of the pipeline; "" for all.

    Raises:
        LaunchError: there is no such log.
    """
    log = newest_log(run)
    if rank is None and log is None and not task:
        rank = 0  # the trainer was started alone, without the pipeline
    if rank is not None:
        if task not in ("", "train"):
            raise LaunchError(f"{task} is one process; leave out --rank")
        file = run.directory / "logs" / f"rank-{rank}.log"
        if not file.is_file():
            ranks = sorted(path.stem for path in file.parent.glob("rank-*.log"))
            if ranks:
                raise LaunchError(f"{file} does not exist; there are logs of: {', '.join(ranks)}")
            now = of_local(run)
            raise LaunchError(
                f"no rank of {run.name} has written a log; its state is {now.state}: {now.why}".rstrip(": ")
            )
        for line in _lines(file, run, follow):
            print(line, end="", flush=True)
        return
    if log is None:
        raise LaunchError(f"{run.workdir / 'logs'} holds no log of {run.name}; it was not started from there")
    lines = _lines(log, run, follow)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        watcher = Watcher(console, nowhere, verbose=bool(os.environ.get("YAONGI_VERBOSE")))
        watcher.follow(_of_step(lines, task) if task else lines)
    if watcher.failure:
        console.print(f"error: {watcher.failure}", style="red", markup=False, highlight=False, soft_wrap=True)


def _lines(file: Path, run: Run, follow: bool) -> Iterator[str]:
    """Whole lines of a file; with `follow` also those to come, until the run's process has ended."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        part = ""
        while True:
            alive = follow and background.is_alive(run.workdir, run.name)  # asked before reading: nothing is missed
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
