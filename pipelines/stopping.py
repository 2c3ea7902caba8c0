"""How a run that this machine drives is stopped: a file says so to what starts later, signals to what runs already.

A signal alone is lost between two steps and while a process imports its packages. So the stop is written down first,
and each step looks for it before it begins (`components.running.step`).
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
    "stopping: the step that runs ends first, the trainer after a checkpoint; once more: without one\n",
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
    """A signal during the block, when no other process has anything to save, ends it with `Stopped`."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Stopped(128 + number)

    with _handled_by(end):
        yield


class Stop:
    """Passes SIGINT and SIGTERM on to the group of a child process during `handled`: each time with more force.

    Attributes:
        received: the signals that came.
        environment: what the child and all that it starts must have.
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
        """From now on `child`, the leader of its group; also what came before it was there."""
        self._child = child
        if self.received:
            self._pass_on()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) == 1:
            self._file.write_text(str(number), encoding="ascii")
        # Not print: the signal may have met one.
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
