"""What a step says when its volume is full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on the volume, or none left of the quota there


@contextmanager
def full_volume_explained(directory: Path) -> Iterator[None]:
    """Turn "no space left" or "quota exceeded" into a line that names the directory and the remedy.

    Raises:
        OSError: with that line; any other error as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{directory}: the volume is full; make room and run again, what is done stays") from None
