"""What a step says when the machine fails it, its volume full or read-only, and of which part of its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ForeseenError, VolumeError, in_words, of_the_machine


def made(directory: Path) -> Path:
    """The directory, after it has been made with all above it.

    Raises:
        VolumeError: that cannot be done there.
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
    """Turn an OSError that the machine is the cause of into a line that names the file or directory and the remedy.

    Raises:
        VolumeError: with that line; any other error is raised as it is.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise VolumeError(f"{error.filename}: is gone; put it back, or run again to make it anew") from None
    except OSError as error:
        known = of_the_machine(error, directory)
        if known is None:
            raise
        raise known from None


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put `what` in front of every foreseen error, which stays of its class: data, volume, network."""
    try:
        yield
    except ForeseenError as error:
        error.args = (f"{what}: {error}",)
        raise
