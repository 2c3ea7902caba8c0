"""What the files beside a shard have in common, which list something of each document: `.docs` and `.answers`. Imports
no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import DataError
from trainer.files import unreadable


def beside(prefix: str | Path, suffix: str) -> Path:
    """The file of a shard with this suffix."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + suffix)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Around the reading of such a file.

    Raises:
        DataError: it is missing or malformed.
        UnreadableError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run the shards step again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, struct.error) as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: damaged ({problem}); run the shards step again")
