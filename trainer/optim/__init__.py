"""Optimizers of one run: Muon for matrices, AdamW for the rest, and the learning-rate schedule over both."""

from trainer.optim.optimizers import Optimizers, build_optimizers, clip_gradients
from trainer.optim.schedule import learning_rate_factor

__all__ = ["Optimizers", "build_optimizers", "clip_gradients", "learning_rate_factor"]
