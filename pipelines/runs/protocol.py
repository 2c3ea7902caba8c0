"""The operations on a run, wherever it is. A new kind of place is a class with these and a line in find.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console

from pipelines.runs.view import View


class Run(Protocol):
    """Every operation raises a one-line LaunchError or SpecError if it cannot be done."""

    @property
    def name(self) -> str: ...

    def view(self) -> View:
        """The current progress, read again by each call."""

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        """Print its log.

        Args:
            follow: continue until it ends.
            rank: only the training log of this rank; None for everything.
            task: only this step; "" for all.
        """

    def stop(self, write: Callable[[str], None]) -> str:
        """Stop it and wait until it has ended; training saves a checkpoint first. Returns a message for the user.

        Args:
            write: receives progress messages while this waits.
        """

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        """Start it again from its last checkpoint; returns a message for the user.

        Args:
            sets: FIELD=VALUE for each field to change.
            write: receives the names of created objects.
        """

    def why(self) -> str:
        """One sentence why it does not run, or how it ended, and what to do."""
