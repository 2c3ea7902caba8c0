"""Checkpoints. Signatures first; the body follows in the next commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def latest(run_dir: str | Path) -> Path | None:
    """Newest checkpoint of the run that verifies; None when the run has none.

    Raises:
        TrainingError: 66, when there are checkpoints and none of them verifies.
    """
    raise NotImplementedError


def verify(path: str | Path) -> dict[str, Any]:
    """Compare every file with `checkpoint.json` and return its contents (step, spec, digests, cursor, digest …).

    Raises:
        TrainingError: 66, naming the first damaged, missing or surplus file.
    """
    raise NotImplementedError


def load_model_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Fill `model` (parameters and buffers) from a checkpoint, one process, no process group; returns checkpoint.json.

    Raises:
        TrainingError: 66, when the checkpoint is damaged or holds another model.
    """
    raise NotImplementedError
