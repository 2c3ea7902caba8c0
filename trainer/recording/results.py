"""The JSON files that the tasks of a run leave behind. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError

LOSS_SHARE, MOST_LOSS_STEPS = 10, 50


def headline_loss(records: Sequence[dict[str, Any]]) -> tuple[float | None, int]:
    """The reported loss of a training and the number of steps it averages: the last tenth, at most 50.

    The loss of one step depends mostly on its batch. Skipped steps, which have no loss, do not count.

    Args:
        records: lines of metrics.jsonl in order, at least the last ones.
    """
    if not records:
        return None, 0
    wanted = min(max(records[-1]["step"] // LOSS_SHARE, 1), MOST_LOSS_STEPS)
    losses = [record["loss"] for record in records[-wanted:] if record["loss"] is not None]
    return (sum(losses) / len(losses), len(losses)) if losses else (None, 0)


def loss_of(num_steps: int) -> str:
    """Describe what `headline_loss` averages."""
    return f"mean of the last {num_steps} steps" if num_steps > 1 else "of the last step"


def read_json(path: Path, names: Iterable[str] = ()) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file does not exist.

    Raises:
        CheckpointError: it is not a JSON object or lacks one of `names`.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; remove it and run the same command again")
    if lacking := [name for name in names if name not in value]:
        raise CheckpointError(f"{path}: has no '{lacking[0]}'; remove it and run the same command again")
    return value
