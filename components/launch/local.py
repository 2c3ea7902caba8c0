"""Run one task of the trainer on this machine: the same entrypoint as in a pod, in its own session."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from manifests.spec import JobSpec
from trainer import thismachine
from trainer.errors import LaunchError
from trainer.exitcodes import STOPS, ExitCode, of_process
from trainer.process import exclusive, launcher
from trainer.process.failures import meaning

FORWARDED = (signal.SIGINT, signal.SIGTERM)
# The trainer's last line, which the launcher's error repeats.
LAST_WORDS = re.compile(r"(error|exit) \d+ \(")


def run(job: JobSpec, task: str) -> None:
    """Start `python -m trainer.entrypoint TASK` on `run_dir/train.yaml`, show its output, wait.

    SIGINT and SIGTERM are forwarded to it, so that it saves a checkpoint before it ends.

    Raises:
        LaunchError: its exit code was not 0; has that code, its meaning and the trainer's reason.
        LaunchError: another process trains the run.
    """
    if task == "train":
        exclusive.refuse_second(job.run_dir)
    ranks = job.cluster.world_size if task == "train" else 1
    run_entrypoint(task, f"{job.run_dir}/train.yaml", ranks)


def run_entrypoint(task: str, spec_file: str, ranks: int, sets: Sequence[str] = ()) -> None:
    """As `run`, for a TrainSpec file, a number of processes and changes of the form `a.b=c`."""
    changes = [argument for change in sets for argument in ("--set", change)]
    command = [sys.executable, "-m", "trainer.entrypoint", task, "--spec", spec_file, *changes]
    # In its own session a Ctrl-C in the terminal reaches it once, through us, and not every rank a second time.
    with (
        tempfile.NamedTemporaryFile("r", prefix="yaongi-reason-") as told,
        subprocess.Popen(
            command,
            env=environment(ranks) | {"YAONGI_TERMINATION_LOG": told.name} | launcher.named(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
        _forwarding_to(child) as passed_on,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if not LAST_WORDS.match(line):
                    print(line, end="", flush=True)
        except BaseException:
            # Nobody reads our output, most likely because our parent was killed. So stop the trainer.
            if not passed_on:
                child.terminate()
            raise
        code = of_process(child.wait())
        reason = _reason(told.read())
    if code != ExitCode.OK:
        raise LaunchError(_sentence(task, code, reason), code)


def environment(ranks: int) -> dict[str, str]:
    """Variables for torchrun; threads are divided so that ranks do not compete for cores."""
    cores = len(os.sched_getaffinity(0))
    return {
        "OMP_NUM_THREADS": str(max(cores // ranks, 1)),
        **os.environ,
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(ranks),
        "PYTHONUNBUFFERED": "1",
        thismachine.VARIABLE: "1",
    }


@contextmanager
def _forwarding_to(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Forward stop signals; yields the list of those received.

    A second signal makes the trainer stop without a checkpoint. After the death of our parent only one is forwarded:
    several processes notice that death and each sends one, but nobody asks to skip the checkpoint.
    """
    started_by, passed_on = launcher.Launcher(), list[int]()

    def forward(number: int, _frame: FrameType | None) -> None:
        if not (passed_on and started_by.is_gone()):
            passed_on.append(number)
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(termination_message: str) -> str:
    """The reason that the entrypoint wrote; "" if it died before that."""
    try:
        return str(json.loads(termination_message)["reason"])
    except (ValueError, KeyError):
        return ""


def _sentence(task: str, code: int, reason: str) -> str:
    said = f": {reason}" if reason else ""
    if code in STOPS:
        return f"{task} was stopped{said}; run the same command again to continue"
    return f"{task} ended with exit code {code} ({meaning(code)}){said}"
