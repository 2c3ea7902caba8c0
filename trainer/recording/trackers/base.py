"""What every tracker takes: scalars by step, events, a summary. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

# evaluation: of a checkpoint, after the training; the others are of the training.
EventName = Literal["start", "restart", "end", "error", "evaluation"]
STOPPED = "stopped"  # in an end's `state`: before the last step, by a signal or a limit


class Tracker(ABC):
    """A place for the numbers of one run. TensorBoard's files are one; they have no events."""

    @abstractmethod
    def add(self, step: int, values: dict[str, float]) -> None:
        """The scalars of one step."""

    @abstractmethod
    def flush(self) -> None:
        """Hand over what has been added."""

    @abstractmethod
    def close(self) -> None:
        """Hand over the rest; nothing is added afterwards."""

    def event(self, name: EventName, values: dict[str, Any]) -> None:  # noqa: B027  # not every tracker has events
        """Something that happened to the run, once."""

    def summary(self, values: dict[str, Any]) -> None:  # noqa: B027
        """Results of the run: numbers and texts, which replace former ones of the same name."""


class Refused(Exception):
    """The tracker cannot be used, and trying again would not help; the text says how to fix it."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with names joined by dots; lists stay."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary, flat."""
    return {
        name: float(value)
        for name, value in flat(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
