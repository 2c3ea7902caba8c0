"""Whether the process that started this one, and watches it, still lives. Imports no torch.

A launcher that is killed can tell nobody, so it names itself to what it starts, and that looks. Where the kernel gives
a descriptor of a process (Linux), a number that has become another process's deceives nobody.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress

VARIABLE = "YAONGI_LAUNCHER"  # number of the process that the one started by it must not outlive
LOOK_SECONDS = 1.0


def named() -> dict[str, str]:
    """The variable for what this process starts."""
    return {VARIABLE: str(os.getpid())}


class Launcher:
    """The process that the environment names; `pid` is None without one, which is never gone."""

    def __init__(self) -> None:
        value = os.environ.get(VARIABLE, "")
        self.pid = int(value) if value.isdecimal() else None
        self._descriptor: int | None = None
        if self.pid is not None and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # it is gone already, or a sandbox knows no such call: `_is_listed` tells
                self._descriptor = os.pidfd_open(self.pid)

    def is_gone(self) -> bool:
        return self._has_ended(0)

    def wait(self) -> None:
        """Return once it is gone."""
        while not self._has_ended(LOOK_SECONDS):
            pass

    def end_with(self) -> None:
        """From now on SIGTERM ends this process, as it would at a person's wish, when the launcher is gone."""

        def end() -> None:
            self.wait()
            os.kill(os.getpid(), signal.SIGTERM)

        if self.pid is not None:
            threading.Thread(target=end, name="launcher", daemon=True).start()

    def _has_ended(self, wait_seconds: float) -> bool:
        """Whether it has ended now or does within that time."""
        if self.pid is None:
            time.sleep(wait_seconds)
            return False
        if self._descriptor is not None:
            look = select.poll()
            look.register(self._descriptor, select.POLLIN)
            return bool(look.poll(wait_seconds * 1000))
        if not _is_listed(self.pid):
            return True
        time.sleep(wait_seconds)
        return False


def _is_listed(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
