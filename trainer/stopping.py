"""Why a rank may want to stop before the last step: a signal, the deadline, or a launcher that is gone."""

from __future__ import annotations

import signal
from types import FrameType

from trainer.exitcodes import ExitCode
from trainer.limits import Limits

STOP_CODES = (ExitCode.LIMIT, ExitCode.TERMINATED, ExitCode.INTERRUPTED)  # the first one that any rank wants is taken


class StopWish:
    """Remembers SIGTERM and SIGINT and watches deadline and lease; the loop asks once a step."""

    def __init__(self, run_dir: str) -> None:
        self._signal = 0
        self._limits = Limits(run_dir)
        self.reason = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def code(self) -> int:
        """The exit code this rank wants to end with; 0: none. A limit that has passed wins over the signal it sent."""
        if reason := self._limits.passed(at_once=bool(self._signal)):
            self.reason = reason
            return ExitCode.LIMIT
        if not self._signal:
            return 0
        self.reason = f"received {signal.Signals(self._signal).name}"
        return ExitCode.INTERRUPTED if self._signal == signal.SIGINT else ExitCode.TERMINATED

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
