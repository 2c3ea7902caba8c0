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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.launch import LaunchError
from trainer.data.manifest import atomic_write
from trainer.limits import LEASE, lease_expires

LEASE_SECONDS = 180.0
RENEWAL_SECONDS = 30.0


@contextmanager
def held(
    run_dir: str | Path, lease_seconds: float = LEASE_SECONDS, renewal_seconds: float = RENEWAL_SECONDS
) -> Iterator[None]:
    """Hold the run's lease during the block; given back afterwards.

    A former launcher's lease is waited for: it lapses if that launcher is dead.

    Raises:
        LaunchError: another launcher renews it.
    """
    path = Path(run_dir) / LEASE
    _wait_for(path)
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    ended = threading.Event()

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
        yield
    finally:
        ended.set()
        keeper.join()
        path.unlink(missing_ok=True)


def _wait_for(path: Path) -> None:
    first = lease_expires(path.parent)
    if first is not None and first > time.time():
        print(
            f"launcher: waiting up to {first - time.time():.0f} s for the former launcher's lease to lapse", flush=True
        )
    while (expires := lease_expires(path.parent)) is not None and expires > time.time():
        if expires != first:
            raise LaunchError(
                f"another launcher ({_holder(path)}) follows the run in {path.parent}; wait for it or stop it"
            )
        time.sleep(1)


def _holder(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["holder"])
    except (OSError, ValueError, KeyError):
        return "unknown"
