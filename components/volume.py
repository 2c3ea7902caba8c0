"""Error messages of a step for machine faults such as a full or read-only volume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ForeseenError, VolumeError, in_words, of_the_machine


def made(directory: Path) -> Path:
    """Create the directory and its parents; returns it.

    Raises:
        VolumeError: it cannot be created there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = of_the_machine(error) or VolumeError(
            f"{directory}: no folder can be made there ({in_words(error.strerror)}); give another place"
        )
        raise said from None
    return directory


@contextmanager
def volume_explained(directory: Path) -> Iterator[None]:
    """Turn an OSError caused by the machine into one line with the file or directory and the remedy.

    Raises:
        VolumeError: with that line; other errors are raised unchanged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise VolumeError(f"{error.filename}: is gone; restore it, or run again to make it again") from None
    except OSError as error:
        known = of_the_machine(error, directory)
        if known is None:
            raise
        raise known from None


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put `what` in front of every foreseen error and keep its class (data, volume, network)."""
    try:
        yield
    except ForeseenError as error:
        error.args = (f"{what}: {error}",)
        raise
