"""What ends a run from outside: its deadline, and the end of its launcher.

The operator's own deadline may never fire and a pipeline that is terminated sends no signal, so each pod looks itself:
at the wall clock since its first start, or its first after a stop, and at `run_dir/lease`, which a launcher renews as
long as it lives. Runs that nobody launched have no such file. On one machine the launcher's process itself is looked
at. Imports no torch.
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
TOLD = "limit"  # file in the directory of failures: which limit has passed
LOOK_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 3.0  # of the time between two looks, no more than this counts as silence
UNWATCHED_VARIABLE = "YAONGI_UNWATCHED"  # set in the pods of a job that was made to be followed by no launcher
MISSED_RENEWALS = 2.5  # after so many a launcher that has not been heard of yet is taken for dead
LONG_AGO_SECONDS = 600.0  # more than the clocks of two machines differ


@dataclass(frozen=True)
class Lease:
    """What a launcher writes at each renewal. Seconds; `renewed` is Unix time by the launcher's clock."""

    holder: str
    renewed: float
    renewal_seconds: float
    lapses_after_seconds: float


class LeaseWatch:
    """Counts how long a launcher has been silent, so that clocks of two machines are never compared.

    Only time counts in which the file could be read: when a volume comes back after an outage, a living launcher has
    the same time as before to be heard. A launcher that was never heard of by this process, because it was restarted,
    gets shorter shrift, so that restarts do not add up. Without a lease, silence has no limit.

    Args:
        unwatched: nobody launched this run, so that a lease which is not renewed is of a former launcher and has no
            limit either; one that takes the run over is heard of by its renewals.
        name, kind: of another file that is renewed like a lease, and what it holds.
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
        """How much silence is taken for the launcher's end."""
        if self.lease is None or (self.unwatched and not self.renewals):
            return float("inf")
        if self.renewals:
            return self.lease.lapses_after_seconds
        if time.time() - self.lease.renewed > LONG_AGO_SECONDS:
            return 0.0
        return min(MISSED_RENEWALS * self.lease.renewal_seconds, self.lease.lapses_after_seconds)

    def lapsed(self) -> bool:
        """Look at the file; whether nobody renews it any more."""
        first, since = self._looked is None, self._looked or 0.0
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            content = None
        except OSError:  # a volume that hiccups must not end a run
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
    """Deadline and launcher of a run, as its entrypoint watches them; a limit that has passed stays passed.

    `deadline` is Unix time, None without one.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.deadline: float | None = None
        self._watch = LeaseWatch(run_dir, unwatched=UNWATCHED_VARIABLE in os.environ)
        self._launcher = Launcher()
        self._reason: str | None = None

    def passed(self) -> str | None:
        """Why the run has to end now, in one line; None when it may go on."""
        if self._reason is None:
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        if self.deadline is not None and time.time() >= self.deadline:
            return "the deadline has passed; raise train.runtime.deadline_seconds and resume to go on"
        if self._launcher.is_gone():
            return f"the process that launched this run ({self._launcher.pid}) is gone; launch it again to go on"
        if self._watch.lapsed():
            return (
                f"the launcher has not renewed its lease for {self._watch.silent_seconds:.0f} s, so nobody watches "
                f"this run; launch it again to go on, or delete {self._watch.file} to go on without a launcher"
            )
        return None


def tell(directory: str | Path, reason: str) -> None:
    """Let the ranks know, before they get SIGTERM, that it is for a limit that has passed."""
    (Path(directory) / TOLD).write_text(reason, encoding="utf-8")


def told() -> str | None:
    """The limit that has passed, for which the entrypoint stops this rank; None for any other stop."""
    try:
        return (Path(os.environ[DIRECTORY_VARIABLE]) / TOLD).read_text(encoding="utf-8")
    except (KeyError, OSError):
        return None
