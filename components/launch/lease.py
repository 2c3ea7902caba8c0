"""The lease of a run: a file in its directory that a living launcher renews, so that a run nobody watches ends itself.

The trainer looks at it (`trainer.process.limits`) and stops with a checkpoint when it has lapsed; a second launcher
looks at it to find out that there is a first.

A launcher that is killed without a signal shall leave no worker running a minute later. That minute is shared out: 36 s
of silence, a second to notice, and what is left for the step in progress and its checkpoint. Four renewals may be lost
on the way, so a volume that blocks the launcher's writes for more than half a minute, but not the workers' reads, ends
a healthy run with a checkpoint, from which the next launch goes on. Workers that have not started read no lease: an
owner reference and the pipeline's exit handler remove those, and one that does start later ends itself.
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
from dataclasses import asdict
from pathlib import Path

from components import measuring
from trainer.errors import LaunchError
from trainer.files import atomic_write
from trainer.process.limits import LEASE, Lease, LeaseWatch

LEASE_SECONDS = 36.0
RENEWAL_SECONDS = 8.0


@contextmanager
def held(
    run_dir: str | Path, lease_seconds: float = LEASE_SECONDS, renewal_seconds: float = RENEWAL_SECONDS
) -> Iterator[Callable[[], None]]:
    """Hold the run's lease during the block; given back afterwards.

    A dead launcher's lease is taken over before it lapses, if this one begins in time, so that the run goes on.

    Yields:
        A function that says: do not give it back, let it lapse. For a launcher that cannot tell whether its job still
        runs; without a lease such a job would run on unwatched.

    Raises:
        LaunchError: another launcher renews it.
    """
    path = Path(run_dir) / LEASE
    _wait_for(path.parent)
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    ended, abandoned = threading.Event(), threading.Event()

    def renew() -> None:
        atomic_write(path, json.dumps(asdict(Lease(holder, time.time(), renewal_seconds, lease_seconds))).encode())

    def taken_over() -> bool:
        now = LeaseWatch(path.parent)
        now.lapsed()
        return now.lease is not None and now.lease.holder != holder

    def keep() -> None:
        while not ended.wait(renewal_seconds):
            if taken_over():  # this process stood still for so long that it was taken for dead
                print("launcher: another launcher has taken this run over; leaving its lease alone", flush=True)
                abandoned.set()
                return
            try:
                renew()
                measuring.add("lease_renewals_total", outcome="renewed")
            except OSError as error:
                measuring.add("lease_renewals_total", outcome="failed")
                # A volume may be away for a while; the lease outlives several renewals.
                print(f"launcher: the lease {path} cannot be renewed ({error.strerror}); trying again", flush=True)

    for outcome in ("renewed", "failed"):  # from 0, else the first would not show as an increase
        measuring.add("lease_renewals_total", 0, outcome=outcome)
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
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # must not hide how the run ended
                print(f"launcher: the lease {path} could not be given back ({error.strerror}); it lapses", flush=True)


def _wait_for(run_dir: Path) -> None:
    """Return once nobody holds the lease: there is none, or its holder has missed enough renewals to be dead."""
    watch = LeaseWatch(run_dir)
    told = False
    while not watch.lapsed() and watch.lease is not None:
        if watch.renewals:
            raise LaunchError(
                f"another launcher ({watch.lease.holder}) follows the run in {run_dir}; wait for it or stop it"
            )
        if not told:
            seconds = watch.patience_seconds
            print(f"launcher: waiting up to {seconds:.0f} s to see whether the former launcher is alive", flush=True)
            told = True
        time.sleep(min(1.0, watch.patience_seconds / 4))
