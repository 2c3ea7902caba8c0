"""Run the pipeline on this machine: the same object that Kubeflow Pipelines executes, under kfp.local."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from components.launch import LaunchError
from components.plan.length import continued
from components.plan.step import arguments_for, runnable_here
from manifests.spec import JobSpec, changes_of, job_from
from pipelines.progress import Watcher
from trainer import launcher
from trainer.errors import ForeseenError
from trainer.exitcodes import of_process
from trainer.specbase import SpecError, deep_merge


class Stopped(ForeseenError):
    """The run was stopped by a signal; `code` is 128 + its number."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped; run the same command again to continue")
        self.code = code


def local_job(
    preset_or_file: str, changes: dict[str, Any], *, target: str, workdir: Path
) -> tuple[JobSpec, dict[str, Any]]:
    """The job and the pipeline's arguments for a run that this machine drives.

    Args:
        preset_or_file: a preset's name or a job file.
        changes: what `--set` says.
        target: where the trainer runs, "local" or "kubernetes".
        workdir: folder for both trees of a local run. A run on Kubernetes needs the volumes mounted here as they are
            there, so it keeps the spec's own directories.

    Raises:
        SpecError: the spec is wrong, or its directories cannot be written here.
    """
    preset, wanted = changes_of(preset_or_file)
    wanted = deep_merge(deep_merge(wanted, changes), {"cluster": {"target": target}})
    if target == "local":
        root = workdir.absolute()
        places = {"datasets_dir": f"{root}/datasets", "checkpoints_dir": f"{root}/checkpoints"}
        wanted = deep_merge({"storage": places}, wanted)
    job = continued(job_from({"preset": preset} if preset else {}, wanted, preset_or_file))
    if job.train.begun_with_steps:
        wanted = deep_merge(wanted, {"train": {"begun_with_steps": job.train.begun_with_steps}})
    runnable_here(job)
    for name in ("datasets_dir", "checkpoints_dir"):
        _require_writable(f"storage.{name}", Path(getattr(job.storage, name)), target)
    return job, arguments_for(preset, wanted)


def _require_writable(field: str, directory: Path, target: str) -> None:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        mend = "give another --workdir" if target == "local" else "the volume must be writable for this user"
        raise SpecError(f"{field}: {directory} cannot be written here; {mend}")


def run_pipeline(
    job: JobSpec, arguments: dict[str, Any], *, logs: Path, console: Console, verbose: bool = False
) -> Path:
    """Execute the pipeline with `arguments`, showing its steps; returns the file in `logs` with all that was printed.

    Raises:
        LaunchError: a step failed; the message names it and says why.
        Stopped: SIGINT or SIGTERM ended it, each step having been told.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / f"{job.run_name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    with tempfile.TemporaryDirectory(prefix="yaongi-") as scratch, log_path.open("w", encoding="utf-8") as log:
        file = Path(scratch) / "arguments.json"
        file.write_text(json.dumps(arguments), encoding="utf-8")
        command = [sys.executable, "-u", "-m", "pipelines.execute", str(file), f"{scratch}/outputs"]
        environment = os.environ | {"TMPDIR": scratch} | launcher.named() | ({"YAONGI_VERBOSE": "1"} if verbose else {})
        watcher = Watcher(console, log, verbose=verbose)
        # A session of its own makes one group of all that we start, so that a signal reaches that and nothing else.
        with (
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            ) as child,
            _signals_to_group_of(child) as received,
        ):
            assert child.stdout is not None
            watcher.follow(child.stdout)
            code = of_process(child.wait())
    if received:
        raise Stopped(128 + received[0])
    if code:
        line = watcher.failure or watcher.last_line
        raise LaunchError(f"{line or f'the pipeline ended with exit code {code}'} (full log: {log_path})", watcher.code)
    return log_path


@contextmanager
def _signals_to_group_of(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the child's process group; gives the signals that came."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        # The first time as asked, then with more force for a step that does not end.
        os.killpg(child.pid, number if len(received) == 1 else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
