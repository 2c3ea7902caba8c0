"""Atomic writes, durable renames, checksums, and the error for unreadable files.

Imports no torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import xxhash

from trainer.errors import DataError, VolumeError, in_words

Algorithm = Literal["sha256", "xxh3_128"]


class UnreadableError(VolumeError, DataError):
    """A data file that cannot be read; code that recreates damaged data recreates this too."""


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a temporary file, fsync and rename, so that `path` is never partly written."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def replace_link(link: Path, target: str | Path) -> None:
    """Make or change a symbolic link, without a moment in which there is none."""
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there; empty if it is not."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sync_directory(directory: str | Path) -> None:
    """Make the renames in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A hidden directory beside `final` that takes its place when the block ends; after an error it is removed.

    What killed processes have left of the same directory is removed too.

    Raises:
        VolumeError: it cannot be created.
    """
    # Unique names: NFS may keep a file of an earlier one (.nfs…) as long as a process reads it.
    draft, old = (final.with_name(f".{final.name}-{what}-{time.time_ns()}") for what in ("unfinished", "old"))
    for what in ("unfinished", "old"):
        for leftover in final.parent.glob(f".{glob.escape(final.name)}-{what}-[0-9]*"):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise VolumeError(f"{draft}: cannot be created ({error.strerror}); choose another place") from None
    try:
        yield draft
        sync_directory(draft)
        if final.exists():
            final.rename(old)
        draft.rename(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def checksum(path: str | Path, algorithm: Algorithm) -> str:
    """Hex digest of a file, read in blocks.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def unreadable(path: str | Path, error: OSError) -> UnreadableError:
    """The error to raise for an OSError while reading a file."""
    said = error.strerror or in_words(error)
    return UnreadableError(f"{path}: cannot be read ({said}); check the volume and its permissions")
