"""Stop a run driven by this machine: signals for running processes, a stop file for those that start later.

A signal alone is lost between two steps and while a process imports its packages. So the stop file is written first,
and each step checks for it before it begins (`components.running.step`).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from components.running import STOP_FILE_VARIABLE
from trainer.errors import ForeseenError

SAID = (
    "stopping: the running step ends first, the trainer after a checkpoint; once more: without one\n",
    "stopping without a checkpoint; once more: at once\n",
    "killed\n",
)


class Stopped(ForeseenError):
    """The run was stopped by a signal; `code` is 128 + its number."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped; run the same command again to continue")
        self.code = code


@contextmanager
def ends_at_once() -> Iterator[None]:
    """End the block with `Stopped` at a signal; for times when no other process has anything to save."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    with _handled_by(end):
        yield


class Stop:
    """During `handled`, forwards SIGINT and SIGTERM to the process group of a child, with more force each time.

    Attributes:
        received: the signals received.
        environment: variables that the child and its children need.
    """

    def __init__(self, folder: Path) -> None:
        self.received: list[int] = []
        self._file = folder / "stop"
        self.environment = {STOP_FILE_VARIABLE: str(self._file)}
        self._child: subprocess.Popen[str] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        with _handled_by(self._receive):
            yield

    def reaches(self, child: subprocess.Popen[str]) -> None:
        """Forward signals to `child`, the leader of its group, from now on; also those already received."""
        self._child = child
        if self.received:
            self._pass_on()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) == 1:
            self._file.write_text(str(number), encoding="ascii")
        # Not print: the signal may have interrupted one.
        with suppress(OSError):
            os.write(1, SAID[min(len(self.received), len(SAID)) - 1].encode())
        self._pass_on()

    def _pass_on(self) -> None:
        if self._child is None:
            return
        force = (self.received[0], signal.SIGTERM, signal.SIGKILL)[min(len(self.received), 3) - 1]
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, force)


@contextmanager
def _handled_by(handler: signal._HANDLER) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
