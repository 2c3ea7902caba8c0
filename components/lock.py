"""One process at a time in a directory of data."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.manifest import DataError


@contextmanager
def alone(directory: Path, doing: str) -> Iterator[None]:
    """Make `directory` and hold its lock; the kernel drops it when the process dies, however it dies.

    Args:
        doing: what another process would be doing there, for the message.

    Raises:
        DataError: another process holds the lock, or the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a")  # noqa: SIM115 - closed below; "a" leaves the file's time alone
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; check storage.datasets_dir and its permissions") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{directory}: another process is {doing} there; wait for it or stop it") from None
        yield
