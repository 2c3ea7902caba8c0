"""Activation checkpointing: what the backward pass recomputes instead of keeping it.

    none       nothing
    selective  all but matrix products, attention and experts: norms, convolution, activations, scan; Engram whole
    full       every layer from its input
    sqrt, RecomputeSpec
               some layers from their input, or groups of layers from that of the first; the others keep everything

Regions end in a matrix product, which is not recomputed: the backward pass needs only its inputs, and torch stops a
region once it has them. An FP8 product is recomputed without effect on its scales (trainer/fp8/linear.py). The choice
of experts is recomputed only with whole layers. `trainer.arithmetic.activations` has the layers of each policy, and
what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.runtimespec import Policy


class Recomputed(nn.Module):
    """A module with parts that may be recomputed; trainer/recomputing.py selects them."""

    policy: Policy = "none"

    def region(self, policy: Policy, function: Callable[..., Any], *tensors: Any) -> Any:
        """function(*tensors), recomputed in the backward pass if that is the policy of this module."""
        if self.policy != policy or not torch.is_grad_enabled():
            return function(*tensors)
        return recomputed(function, *tensors)


def recomputed(function: Callable[..., Any], *tensors: Any) -> Any:
    """function(*tensors), of which the backward pass keeps only the tensors."""
    # Nothing here draws random numbers.
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
