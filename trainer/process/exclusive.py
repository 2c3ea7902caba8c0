"""One training at a time in a run directory: a lock that ends with its process, plus a heartbeat in the lock file.

The kernel releases the lock of a process however it dies, so the next start need not wait. Between machines a lock
alone is not reliable: NFS keeps the lock of a lost machine for a minute and a half or forever, and some mounts only
have local locks. So the holder renews the file's content, and a process that finds another machine's name in it checks
whether renewals continue. A process that was considered dead ends itself. Rank 0 holds the lock for all ranks. Imports
no torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TypeGuard

from trainer.errors import LaunchError, VolumeError
from trainer.exitcodes import ExitCode
from trainer.process import failures
from trainer.process.limits import Lease, LeaseWatch

FILE = ".training"
RENEWAL_SECONDS = 8.0
LAPSES_AFTER_SECONDS = 36.0  # as for a launcher's lease
LOOK_PATIENCE_SECONDS = 0.5  # a check whether a run is being trained holds its lock for a moment
LOOK_SECONDS = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder(Lease):
    """The process that trains; `holder` describes it in words."""

    machine: str


@contextmanager
def held(run_dir: str | Path) -> Iterator[None]:
    """Make this process the only one that trains in `run_dir` during the block; not reentrant.

    Raises:
        LaunchError: another process trains there.
        VolumeError: the directory cannot be written or locked.
    """
    path = Path(run_dir) / FILE
    me = Holder(_in_words(), time.time(), RENEWAL_SECONDS, LAPSES_AFTER_SECONDS, machine())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquired(path)
        _write(file, me)
    except OSError as error:
        raise VolumeError(f"{path}: {error.strerror}; fix the volume, or the permissions on it") from error
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, file, me, ended), name="exclusive", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with suppress(OSError):  # then the next process waits for a heartbeat
            os.ftruncate(file.fileno(), 0)
        file.close()


def refuse_second(run_dir: str | Path) -> None:
    """For launchers, which would otherwise notice late: refuse if a process of this machine trains.

    Raises:
        LaunchError: one does.
    """
    path = Path(run_dir) / FILE
    watch, deadline = LeaseWatch(run_dir, FILE, Holder), time.monotonic() + LOOK_PATIENCE_SECONDS
    while True:
        watch.lapsed()
        try:
            with path.open("rb") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
        except OSError:  # no file, or not readable: the training process will report it
            return
        time.sleep(LOOK_SECONDS)
    if _is_here(watch.lease):
        raise _refused(path, watch.lease)


def machine() -> str:
    """The boot id of this machine; pods on one node share it, as they share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_here(lease: Lease | None) -> TypeGuard[Holder]:
    """Whether it was written on this machine, where the lock is reliable."""
    return isinstance(lease, Holder) and lease.machine == machine()


def _acquired(path: Path) -> BinaryIO:
    watch = LeaseWatch(path.parent, FILE, Holder)
    deadline, told = time.monotonic() + LOOK_PATIENCE_SECONDS, False
    while True:
        # Before the lock is taken: closing any descriptor of the file releases this process's lock.
        lapsed, lease = watch.lapsed(), watch.lease
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        locked = _lock(file)
        if locked and _is_replaced(path, file):
            file.close()
            continue
        if locked and (lapsed or lease is None or _is_here(lease)):
            return file
        file.close()
        if lease is not None and (time.monotonic() > deadline if _is_here(lease) else watch.renewals):
            raise _refused(path, lease)
        is_silent = lapsed or (lease is None and watch.silent_seconds > LAPSES_AFTER_SECONDS)
        if not locked and is_silent and not _is_here(lease):
            log.warning("%s: its holder has stopped renewing it; taking the run over", path)
            path.unlink(missing_ok=True)
            watch = LeaseWatch(path.parent, FILE, Holder)
        elif lease is not None and not _is_here(lease) and not told:
            log.info("waiting up to %.0f s to see whether %s is alive", watch.patience_seconds, lease.holder)
            told = True
        time.sleep(LOOK_SECONDS)


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the errno depends on the file system
        return False
    return True


def _keep(path: Path, file: BinaryIO, me: Holder, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL_SECONDS):
        try:
            if _is_replaced(path, file):
                reason = f"{path}: another process has taken this run over, because this one had stopped renewing it"
                failures.record(ExitCode.UNAVAILABLE, reason)
                print(reason, file=sys.stderr, flush=True)
                os._exit(ExitCode.UNAVAILABLE)  # saving would overwrite the other's checkpoints
            _write(file, replace(me, renewed=time.time()))
        except OSError as error:
            log.warning("%s cannot be renewed (%s); trying again", path, error.strerror)


def _is_replaced(path: Path, file: BinaryIO) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True


def _write(file: BinaryIO, me: Holder) -> None:
    """Write in place, because a new file would not be locked. A reader of a partial write counts it as a renewal,
    correctly."""
    content = json.dumps(asdict(me)).encode()
    os.ftruncate(file.fileno(), len(content))
    os.pwrite(file.fileno(), content, 0)


def _in_words() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _refused(path: Path, by: Lease) -> LaunchError:
    return LaunchError(f"this run is being trained by {by.holder}; wait for it or stop it ({path.parent})")
