"""Lock files: one process at a time in a data directory, or on a part of the work there."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import LaunchError, VolumeError, of_the_machine


@contextmanager
def alone(directory: Path, doing: str) -> Iterator[None]:
    """Create `directory` and hold its lock; the kernel releases it however the process dies.

    Args:
        doing: what another process does there, for the message.

    Raises:
        LaunchError: another process holds the lock.
        VolumeError: the directory cannot be created.
    """
    with _opened(directory) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(directory, doing) from None
        yield


@contextmanager
def alone_on(directory: Path, doing: str, first: int, count: int) -> Iterator[None]:
    """As `alone`, but locks only pieces of work [first, first + count): one byte of the lock file for each.

    Two holders in one process do not exclude each other. A directory is locked either this way or by `alone`.
    """
    with _opened(directory) as lock:
        try:
            if count:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
        except (BlockingIOError, PermissionError):  # the errno depends on the file system
            raise _taken(directory, doing) from None
        yield


def _opened(directory: Path) -> IO[str]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return open(directory / ".lock", "a")  # "a" keeps the file's mtime
    except OSError as error:
        known = of_the_machine(error) or VolumeError(f"{error.filename}: {error.strerror}; check storage.datasets_dir")
        raise known from None


def _taken(directory: Path, doing: str) -> LaunchError:
    return LaunchError(f"{directory}: another process is {doing} there; wait for it or stop it")
