"""The two clocks that end a run from outside: its deadline and its launcher's lease.

The operator's own deadline may never fire and a pipeline that is terminated sends no signal, so the run looks itself:
at the wall clock since its first start, or its first after a stop, and at `run_dir/lease`, which a launcher renews as
long as it lives. Runs that nobody launched have no such file. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

LEASE = "lease"
DEADLINE_VARIABLE = "YAONGI_DEADLINE"  # Unix time, set by the entrypoint
_LOOK_SECONDS = 5.0


def passed(run_dir: str | Path) -> str | None:
    """Why the run has to end now, in one line; None when it may go on."""
    deadline = os.environ.get(DEADLINE_VARIABLE)
    if deadline and time.time() >= float(deadline):
        return "the deadline has passed; raise runtime.deadline_seconds and resume to go on"
    expires = lease_expires(run_dir)
    if expires is not None and time.time() >= expires:
        late = time.time() - expires
        return f"the launcher's lease lapsed {late:.0f} s ago, so nobody watches this run; resume it to go on"
    return None


def lease_expires(run_dir: str | Path) -> float | None:
    """Unix time at which the launcher's lease lapses; None without a lease, or while it is unreadable."""
    try:
        return float(json.loads((Path(run_dir) / LEASE).read_text(encoding="utf-8"))["expires"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        # A volume that hiccups must not end a run; a launcher that is gone leaves a readable file behind.
        return None


class Limits:
    """`passed`, looked at every few seconds only, for a loop that asks at every step."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        self._next_look = 0.0
        self.reason: str | None = None

    def passed(self, *, at_once: bool = False) -> str | None:
        """As `passed`; `at_once` looks even if the last look was a moment ago."""
        if self.reason is None and (at_once or time.monotonic() >= self._next_look):
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self.reason = passed(self._run_dir)
        return self.reason
