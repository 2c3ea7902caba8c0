"""What people do with a run, wherever it is. A further place is a class with these operations and a line in find.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console

from pipelines.runs.view import View


class Run(Protocol):
    """Every operation raises a LaunchError or SpecError of one line where it cannot be done."""

    @property
    def name(self) -> str: ...

    def view(self) -> View:
        """How far it is now; each call looks anew."""

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        """Print what it has printed.

        Args:
            follow: go on until it ends.
            rank: of the training, that rank's log; None for the whole.
            task: only this step; "" for all.
        """

    def stop(self, write: Callable[[str], None]) -> str:
        """End it, a training after a checkpoint, and wait until it has ended; returns what to tell of it.

        Args:
            write: is told what is waited for.
        """

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        """Start it again from its last checkpoint; returns what to tell of it.

        Args:
            sets: FIELD=VALUE of what is to change.
            write: is told what is made.
        """

    def why(self) -> str:
        """One sentence why it does not run, or how it ended, and what to do."""
