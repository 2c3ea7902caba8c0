"""External limits of a run: its deadline and the end of its launcher.

The operator's deadline may never fire and a terminated pipeline sends no signal, so each pod checks itself: the wall
clock since its first start (or the first after a stop), and `run_dir/lease`, which a live launcher renews. Runs without
a launcher have no such file. On one machine the launcher's process is checked directly. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.process.failures import DIRECTORY_VARIABLE
from trainer.process.launcher import Launcher

LEASE = "lease"
TOLD = "limit"  # file in the directory of failures: the limit that has passed
LOOK_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 3.0  # most seconds between two checks that count as silence
UNWATCHED_VARIABLE = "YAONGI_UNWATCHED"  # set in the pods of a job that was created without a launcher to follow it
MISSED_RENEWALS = 2.5  # after this many, a launcher whose renewals were never seen is considered dead
LONG_AGO_SECONDS = 600.0  # more than the clock skew between two machines


@dataclass(frozen=True)
class Lease:
    """A launcher's lease, rewritten at each renewal. In seconds; `renewed` is Unix time by the launcher's clock."""

    holder: str
    renewed: float
    renewal_seconds: float
    lapses_after_seconds: float


class LeaseWatch:
    """Measures how long a launcher has been silent by this machine's clock, so that no two clocks are compared.

    Only time during which the file could be read counts, so that after a volume outage a live launcher has the same
    time to renew as before. If this process has never seen a renewal, because it was restarted, the limit is shorter,
    so that repeated restarts do not prolong the wait. Without a lease, silence has no limit.

    Args:
        unwatched: the run has no launcher, so a lease without renewals belongs to a former one and has no limit; a
            launcher that takes the run over is noticed by its renewals.
        name, kind: another file that is renewed like a lease, and the type of its content.
    """

    def __init__(
        self, run_dir: str | Path, name: str = LEASE, kind: type[Lease] = Lease, *, unwatched: bool = False
    ) -> None:
        self.unwatched = unwatched
        self.file, self._kind = Path(run_dir) / name, kind
        self.lease: Lease | None = None
        self.renewals = 0  # seen so far
        self.silent_seconds = 0.0
        self._content: bytes | None = None
        self._looked: float | None = None

    @property
    def patience_seconds(self) -> float:
        """Seconds of silence after which the launcher is considered dead."""
        if self.lease is None or (self.unwatched and not self.renewals):
            return float("inf")
        if self.renewals:
            return self.lease.lapses_after_seconds
        if time.time() - self.lease.renewed > LONG_AGO_SECONDS:
            return 0.0
        return min(MISSED_RENEWALS * self.lease.renewal_seconds, self.lease.lapses_after_seconds)

    def lapsed(self) -> bool:
        """Read the file; returns whether its renewals have stopped."""
        first, since = self._looked is None, self._looked or 0.0
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            content = None
        except OSError:  # a short outage of the volume must not end a run
            content = self._content
            since = time.monotonic()
        self._looked = time.monotonic()
        if first or content != self._content:
            self.renewals += not first
            self._content, self.silent_seconds = content, 0.0
            self.lease = _parsed(content, self._kind)
        else:
            self.silent_seconds += min(self._looked - since, LONGEST_LOOK_SECONDS)
        return self.lease is not None and self.silent_seconds >= self.patience_seconds


def _parsed(content: bytes | None, kind: type[Lease]) -> Lease | None:
    try:
        return kind(**json.loads(content)) if content else None
    except (ValueError, TypeError):
        return None


class Limits:
    """Deadline and launcher of a run, checked by its entrypoint; a limit that has passed stays passed.

    `deadline` is Unix time, None without one.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.deadline: float | None = None
        self._watch = LeaseWatch(run_dir, unwatched=UNWATCHED_VARIABLE in os.environ)
        self._launcher = Launcher()
        self._reason: str | None = None

    def passed(self) -> str | None:
        """Why the run must end now, in one line; None if it may continue."""
        if self._reason is None:
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        if self.deadline is not None and time.time() >= self.deadline:
            return "the deadline has passed; raise train.runtime.deadline_seconds and resume"
        if self._launcher.is_gone():
            return f"the process that launched this run ({self._launcher.pid}) is gone; launch it again to continue"
        if self._watch.lapsed():
            return (
                f"the launcher has not renewed its lease for {self._watch.silent_seconds:.0f} s, so nobody "
                f"watches this run; launch it again to continue, or delete {self._watch.file} to continue "
                f"without a launcher"
            )
        return None


def tell(directory: str | Path, reason: str) -> None:
    """Tell the ranks, before they get SIGTERM, which limit has passed."""
    (Path(directory) / TOLD).write_text(reason, encoding="utf-8")


def told() -> str | None:
    """The limit for which the entrypoint stops this rank; None for any other stop."""
    try:
        return (Path(os.environ[DIRECTORY_VARIABLE]) / TOLD).read_text(encoding="utf-8")
    except (KeyError, OSError):
        return None
