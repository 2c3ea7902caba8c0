"""What a step says when a file cannot grow: its volume is full, or a limit on sizes is reached."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WHAT = {
    errno.ENOSPC: "the volume is full; make room",
    errno.EDQUOT: "the volume is full; make room",  # of the quota there
    errno.EFBIG: "a file would be larger than this process or the volume allows; raise the limit (ulimit -f)",
}
FULL = tuple(_WHAT)


def full_volume(where: str | Path, error: OSError) -> str:
    """One line for an error out of FULL: `where`, what is full, and the remedy."""
    return f"{where}: {_WHAT[error.errno or 0]} and run again, what is done stays"


@contextmanager
def full_volume_explained(directory: Path) -> Iterator[None]:
    """Turn an error out of FULL into a line that names the directory and the remedy.

    Raises:
        OSError: with that line; any other error as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(full_volume(directory, error)) from None
