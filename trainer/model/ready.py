"""Functions for generation, where a pass is short and many calls of Python would take longer than the arithmetic.

A mixer's `ready` looks up its weights once and returns a plain function of new positions. Nothing here has a gradient.

Legend: B rows, T new positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.linear import Linear
from trainer.model.norm import RMSNorm
from trainer.model.step import State, Step
from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in

Function = Callable[[Tensor], Tensor]
Ready = Callable[[Tensor, Step, State], Tensor]  # new positions of the residual stream → what is added to them


def plain(weight: Tensor) -> bool:
    """Whether products with this weight need no conversion of numbers."""
    dtype = compute_dtype(weight)
    return dtype == weight.dtype == computed_in(dtype, weight.device)


def linear(module: nn.Module) -> Function:
    """The module as a function."""
    if type(module) is not Linear or module.lora_A is not None or not plain(module.weight):
        return module
    weight, bias = module.weight, module.bias
    return lambda x: F.linear(x, weight, bias)


def normed(module: nn.Module) -> Function:
    """A norm, or nothing for the identity, as a function without gradient."""
    if not isinstance(module, RMSNorm):
        return lambda x_BTD: x_BTD
    weight, shape, eps = module.weight, module.weight.shape, module.eps
    if not plain(weight):
        return module.without_gradient
    return lambda x_BTD: F.rms_norm(x_BTD, shape, weight, eps)
