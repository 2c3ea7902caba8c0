"""Whether the launcher, the process that started and watches this one, is still alive. Imports no torch.

A killed launcher cannot report it, so it passes its pid to its child processes, which check it. Where the kernel offers
process descriptors (pidfd on Linux), a reused pid is not mistaken for the launcher.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress

VARIABLE = "YAONGI_LAUNCHER"  # pid of the process that its child must not outlive
LOOK_SECONDS = 1.0


def named() -> dict[str, str]:
    """The environment variable for child processes of this process."""
    return {VARIABLE: str(os.getpid())}


class Launcher:
    """The process that the environment names; without one, `pid` is None and it is never gone."""

    def __init__(self) -> None:
        value = os.environ.get(VARIABLE, "")
        self.pid = int(value) if value.isdecimal() else None
        self._descriptor: int | None = None
        if self.pid is not None and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # it is gone already, or a sandbox lacks the system call: `_is_listed` decides
                self._descriptor = os.pidfd_open(self.pid)

    def is_gone(self) -> bool:
        return self._has_ended(0)

    def wait(self) -> None:
        """Return once it is gone."""
        while not self._has_ended(LOOK_SECONDS):
            pass

    def end_with(self) -> None:
        """From now on this process gets SIGTERM, like a user's stop, when the launcher is gone."""

        def end() -> None:
            self.wait()
            os.kill(os.getpid(), signal.SIGTERM)

        if self.pid is not None:
            threading.Thread(target=end, name="launcher", daemon=True).start()

    def _has_ended(self, wait_seconds: float) -> bool:
        """Whether it has ended, or ends within that time."""
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
