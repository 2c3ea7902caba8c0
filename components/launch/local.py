"""Run one task of the trainer on this machine: the same entrypoint as in a pod, under its own session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from components.launch import LaunchError
from manifests.spec import JobSpec
from trainer.exitcodes import MEANING, STOPS, ExitCode, of_process

FORWARDED = (signal.SIGINT, signal.SIGTERM)


def run(job: JobSpec, task: str) -> None:
    """Start `python -m trainer.entrypoint TASK` on `run_dir/train.yaml`, show its output, wait.

    SIGINT and SIGTERM are passed on to it, so that it saves a checkpoint before it ends.

    Raises:
        LaunchError: it ended with anything but 0; says the exit code's meaning and the trainer's own reason.
    """
    ranks = job.cluster.world_size if task == "train" else 1
    run_entrypoint(task, f"{job.run_dir}/train.yaml", ranks)


def run_entrypoint(task: str, spec_file: str, ranks: int, sets: Sequence[str] = ()) -> None:
    """As `run`, for a TrainSpec file, a number of processes and changes `a.b=c`."""
    changes = [argument for change in sets for argument in ("--set", change)]
    command = [sys.executable, "-m", "trainer.entrypoint", task, "--spec", spec_file, *changes]
    reason = ""
    # Its own session: a Ctrl-C in the terminal reaches it once, through us, and not every rank a second time.
    with (
        subprocess.Popen(
            command,
            env=environment(ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
        _forwarding_to(child),
    ):
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            if "error:" in line:
                reason = line.partition("error:")[2].strip()
        code = of_process(child.wait())
    if code != ExitCode.OK:
        raise LaunchError(_sentence(task, code, reason), code if code in STOPS else ExitCode.UNEXPECTED)


def environment(ranks: int) -> dict[str, str]:
    """Variables that torchrun reads; threads are shared out so that ranks do not fight for cores."""
    cores = len(os.sched_getaffinity(0))
    return {
        "OMP_NUM_THREADS": str(max(cores // ranks, 1)),
        **os.environ,
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(ranks),
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def _forwarding_to(child: subprocess.Popen[str]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sentence(task: str, code: int, reason: str) -> str:
    meaning = MEANING[ExitCode(code)] if code in set(ExitCode) else "unknown exit code"
    if code in STOPS:
        return f"{task} was stopped: {meaning}; run the same command again to continue"
    return f"{task} ended with exit code {code} ({meaning}){': ' + reason if reason else ''}"
