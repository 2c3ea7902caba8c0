"""Give the parts of a model the policy of activation checkpointing (trainer/model/recompute.py)."""

from __future__ import annotations

from trainer.arithmetic.activations import regions
from trainer.model.hybrid import HybridModel
from trainer.model.recompute import Recomputed
from trainer.runtimespec import Recomputing


def set_policy(model: HybridModel, policy: Recomputing) -> None:
    """Choose what all parts of the model recompute; `budget_gib` must have become `layers`."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.policy = "selective" if policy == "selective" else "none"
    layers = [*model.layers, *(module.layer for module in model.mtp)]
    whole = regions(model.spec, policy)
    for first, last in whole:
        if last == first + 1:
            layers[first].policy = "full"
    model.groups = [(first, last) for first, last in whole if last > first + 1]
