"""The lease of a run: a file in its directory that a living launcher renews, so that a run nobody watches ends itself.

The trainer looks at it (`trainer.limits`) and stops with a checkpoint when it has lapsed; a second launcher looks at it
to find out that there is a first.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from components.launch import LaunchError
from trainer.data.manifest import atomic_write
from trainer.limits import LEASE, lease_expires

LEASE_SECONDS = 180.0
RENEWAL_SECONDS = 30.0
MISSED_RENEWALS = 2.5  # after so many a holder is taken for dead


@contextmanager
def held(
    run_dir: str | Path, lease_seconds: float = LEASE_SECONDS, renewal_seconds: float = RENEWAL_SECONDS
) -> Iterator[Callable[[], None]]:
    """Hold the run's lease during the block; given back afterwards.

    A dead launcher's lease is taken over before it lapses, so that the run it watched goes on.

    Yields:
        A function that says: do not give it back, let it lapse. For a launcher that cannot tell whether its job still
        runs; without a lease such a job would run on unwatched.

    Raises:
        LaunchError: another launcher renews it.
    """
    path = Path(run_dir) / LEASE
    _wait_for(path, dead_when_left=lease_seconds - MISSED_RENEWALS * renewal_seconds)
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    ended, abandoned = threading.Event(), threading.Event()

    def renew() -> None:
        entry = {"expires": time.time() + lease_seconds, "holder": holder}
        atomic_write(path, json.dumps(entry).encode())

    def keep() -> None:
        while not ended.wait(renewal_seconds):
            try:
                renew()
            except OSError as error:
                # A volume may be away for a while; the lease outlives several renewals.
                print(f"launcher: the lease {path} cannot be renewed ({error.strerror}); trying again", flush=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    renew()
    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield abandoned.set
    finally:
        ended.set()
        keeper.join()
        if not abandoned.is_set():
            path.unlink(missing_ok=True)


def _wait_for(path: Path, dead_when_left: float) -> None:
    """Return once nobody holds the lease: there is none, or so little of it is left that its holder must be dead."""

    def left(expires: float) -> float:
        return expires - dead_when_left - time.time()

    first = lease_expires(path.parent)
    if first is not None and left(first) > 0:
        print(f"launcher: waiting up to {left(first):.0f} s to see whether the former launcher is alive", flush=True)
    while (expires := lease_expires(path.parent)) is not None and left(expires) > 0:
        if expires != first:
            raise LaunchError(
                f"another launcher ({_holder(path)}) follows the run in {path.parent}; wait for it or stop it"
            )
        time.sleep(min(1, max(left(expires), 0.01)))


def _holder(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["holder"])
    except (OSError, ValueError, KeyError):
        return "unknown"
