"""Hang watchdog: a rank that stops making steps says where it hangs and ends, instead of holding its GPUs for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from trainer import failures
from trainer.exitcodes import ExitCode


class Watchdog:
    """Ends the process with 161, after a dump of all stacks, when `beat` was not called for `timeout_seconds`.

    A thread watches, because a hang is most often one C++ call that never returns to the interpreter.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was finished: a step, the start-up, a checkpoint."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() - self._last < self._timeout:
                continue
            reason = f"no step finished for {self._timeout:.0f} s (runtime.hang_timeout_seconds); stacks are in the log"
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            failures.record(ExitCode.HANG, reason)
            print(f"error {int(ExitCode.HANG)} (hang watchdog): {reason}", file=sys.stderr, flush=True)
            os._exit(ExitCode.HANG)
