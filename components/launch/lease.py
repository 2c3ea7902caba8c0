"""The lease of a run: a file in its directory that a live launcher renews, so that an unwatched run ends itself.

The trainer reads it (`trainer.process.limits`) and stops with a checkpoint when it has expired; a second launcher reads
it to detect the first.

After a launcher is killed without a signal, no worker may run for more than a minute. Of that minute, 36 s are for
missing renewals, one second to notice, and the rest for the current step and its checkpoint. Four renewals in a row may
be lost. If the volume blocks the launcher's writes, but not the workers' reads, for more than half a minute, a healthy
run ends with a checkpoint, from which the next launch continues. Workers that have not started do not read the lease:
an owner reference and the pipeline's exit handler remove them, and one that starts later ends itself.
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
    """Hold the run's lease during the block and release it afterwards.

    A dead launcher's lease is taken over, if possible before it expires, so that the run continues.

    Yields:
        A function that makes the lease expire instead of being released. For a launcher that does not know whether its
        job still runs: without a lease file that job would run unwatched.

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
            if taken_over():  # this process was suspended for so long that it was considered dead
                print("launcher: another launcher has taken this run over; leaving its lease alone", flush=True)
                abandoned.set()
                return
            try:
                renew()
                measuring.add("lease_renewals_total", outcome="renewed")
            except OSError as error:
                measuring.add("lease_renewals_total", outcome="failed")
                # A volume may be unavailable for a while; the lease survives several missed renewals.
                print(f"launcher: the lease {path} cannot be renewed ({error.strerror}); trying again", flush=True)

    for outcome in ("renewed", "failed"):  # start at 0, else the first one would not show as an increase
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
            except OSError as error:  # must not hide the run's result
                print(f"launcher: the lease {path} could not be removed ({error.strerror}); it expires", flush=True)


def _wait_for(run_dir: Path) -> None:
    """Wait until there is no lease, or its holder has missed so many renewals that it must be dead."""
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
