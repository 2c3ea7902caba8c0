"""The JSON files that the tasks of a run leave behind. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError


def read_json(path: Path, names: Iterable[str] = ()) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file.

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
