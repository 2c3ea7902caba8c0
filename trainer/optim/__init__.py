"""Optimizers of one run: Muon for matrices, AdamW for the rest, and the learning-rate schedule over both.

What needs torch is imported when it is asked for: `rules` is read where there is none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.optim.optimizers import Optimizers, build_optimizers, clip_gradients
    from trainer.optim.schedule import learning_rate_factor

_MODULES = dict.fromkeys(("Optimizers", "build_optimizers", "clip_gradients"), "optimizers")
_MODULES["learning_rate_factor"] = "schedule"

__all__ = ["Optimizers", "build_optimizers", "clip_gradients", "learning_rate_factor"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
