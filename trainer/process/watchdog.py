"""Hang watchdog: a rank that makes no more steps reports where it hangs and exits, instead of holding its GPUs.

It also ends a rank that waits for a failed one. A rank in a collective does not handle torchrun's signal and, with
NCCL, does not notice its peer's death before the communication timeout. It cannot see ranks on other nodes.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from trainer.exitcodes import STOPS, ExitCode
from trainer.process import failures

PEER_SECONDS = 15.0  # without progress after a peer's failure: time for this rank to notice it itself


class Watchdog:
    """Ends the process with 161, after a dump of all stacks, if `beat` was not called for `timeout_seconds`.

    Ends it with 160, without a dump, if it was not called for `PEER_SECONDS` and a peer had recorded a failure before
    that.

    `doing` returns the current activity for the last line.

    A thread checks this, because a hang is mostly a C++ call that never returns to the interpreter.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self.doing: Callable[[], str] = lambda: "start-up"
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Report progress: a finished step, start-up or checkpoint."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 4)):
            idle = time.monotonic() - self._last
            if idle >= PEER_SECONDS and (peer := failed_peer()):
                _end(
                    ExitCode.COMMUNICATION,
                    f"rank {peer.rank} has failed, so this rank stops waiting for it: {peer.reason}",
                )
            if idle < self._timeout:
                continue
            reason = (
                f"no step finished for {self._timeout:.0f} s (train.runtime.hang_timeout_seconds) on "
                f"{failures.node_name()}, which hangs in {self.doing()}; stacks are in the log"
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            _end(ExitCode.HANG, reason)


def failed_peer() -> failures.Failure | None:
    """Another rank of this node that failed at least `PEER_SECONDS` ago; None without an entrypoint."""
    directory = os.environ.get(failures.DIRECTORY_VARIABLE)
    if not directory:
        return None
    own, latest = int(os.environ.get("RANK", "0")), time.time() - PEER_SECONDS
    try:
        peers = [failure for failure in failures.recorded(Path(directory)) if failure.rank != own]
    except OSError:  # removed while it was read; the next check decides
        return None
    return next((peer for peer in peers if peer.time <= latest and peer.code not in STOPS), None)


def _end(code: ExitCode, reason: str) -> None:
    failures.record(code, reason)
    print(f"error {int(code)} ({failures.meaning(code)}): {reason}", file=sys.stderr, flush=True)
    os._exit(code)
