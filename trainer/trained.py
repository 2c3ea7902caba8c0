"""Load a run's trained model for evaluation and export, in one process, without a process group."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoints.checkpoint import CheckpointManifest, latest
from trainer.checkpoints.checkpoint import read_manifest as read_checkpoint_manifest
from trainer.checkpoints.checkpointer import load_model_weights
from trainer.data.manifest import read_manifest, verify
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, LaunchError
from trainer.model.hybrid import HybridModel, build_model
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A run's newest verified checkpoint: the model in evaluation mode, its tokenizer, and the checkpoint's
    manifest."""

    model: HybridModel
    tokenizer: Tokenizer
    checkpoint: CheckpointManifest


def load_trained(
    spec: TrainSpec, device: torch.device, dtype: torch.dtype | None = None, path: Path | None = None
) -> Trained:
    """The model of the newest verified checkpoint of `spec.run_dir`.

    Args:
        dtype: autocast dtype of matrix products; None without autocast.
        path: another checkpoint, instead of the newest.

    Raises:
        LaunchError, CheckpointError: no checkpoint, or none that verifies.
        DataError: the tokenizer is missing, damaged or not the
            checkpoint's.
    """
    path = path or latest(spec.run_dir)
    if path is None:
        raise LaunchError(f"{spec.run_dir}: no checkpoint yet; train first")
    tokenizer = _tokenizer_of(path, spec.tokens.tokenizer)
    model = build_model(spec.model, spec.backends, device=device, dtype=dtype, seed=None).to_empty(device=device)
    checkpoint = load_model_weights(path, model)
    log.info("loaded %s (step %d)", path, checkpoint.step)
    return Trained(model.eval(), tokenizer, checkpoint)


def _tokenizer_of(checkpoint: Path, directory: str) -> Tokenizer:
    """The tokenizer in `directory`, verified to be intact and the one the checkpoint was trained with."""
    trained_with = read_checkpoint_manifest(checkpoint).digests.get("tokenizer", "an unknown one")
    manifest = read_manifest(directory, "tokenizer")
    if manifest.digest != trained_with:
        raise DataError(
            f"{directory}: is tokenizer {manifest.digest[:12]}, {checkpoint} was trained with {trained_with[:12]}; "
            "set tokens.tokenizer to that one"
        )
    verify(directory, manifest)
    return Tokenizer.load(directory)
