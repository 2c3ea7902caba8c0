"""Stop signals of a rank before the last step, sent by a person, the cluster or the entrypoint."""

from __future__ import annotations

import signal
from types import FrameType

from trainer.exitcodes import ExitCode
from trainer.process import limits

STOP_CODES = (
    ExitCode.LIMIT,
    ExitCode.TERMINATED,
    ExitCode.INTERRUPTED,
)  # the first code that any rank requests is used


class StopWish:
    """Remembers SIGTERM and SIGINT; the loop checks it once per step."""

    def __init__(self) -> None:
        self._signal = 0
        self.reason = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def code(self) -> int:
        """The exit code that this rank requests; 0: none."""
        if not self._signal:
            return 0
        if reason := limits.told():  # deadline or lease, for which the entrypoint sent the signal
            self.reason = reason
            return ExitCode.LIMIT
        self.reason = f"received {signal.Signals(self._signal).name}"
        return ExitCode.INTERRUPTED if self._signal == signal.SIGINT else ExitCode.TERMINATED

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
