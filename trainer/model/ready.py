"""Functions for generation, where a pass is short and many calls of Python would take longer than the arithmetic.

A mixer's `ready` looks up its weights once and returns a plain function of new positions. Nothing here has a gradient.

Legend: B rows, T new positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.linear import Linear
from trainer.model.norm import RMSNorm
from trainer.model.quantised import QuantisedLinear
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
    if isinstance(module, QuantisedLinear):
        return module.forward
    if type(module) is not Linear or module.lora_A is not None or not plain(module.weight):
        return module
    weight, bias = module.weight, module.bias
    return lambda x: F.linear(x, weight, bias)


def normed(module: nn.Module) -> Function:
    """A norm, or nothing for the identity, as a function without gradient."""
    if not isinstance(module, RMSNorm):
        return lambda x_D: x_D
    return rms(module.weight, module.eps) if plain(module.weight) else module.without_gradient


def rms(weight_D: Tensor, eps: float) -> Function:
    """x · rsqrt(mean(x²) + eps) · weight in FP32, as x · √n / √(Σx² + n·eps): fewer operations than torch's on CPUs."""
    width = weight_D.shape[-1]
    scaled_D, total = weight_D * math.sqrt(width), width * eps

    def function(x_D: Tensor) -> Tensor:
        if x_D.dtype != weight_D.dtype:  # BF16 beside weights in FP32
            return F.rms_norm(x_D.float(), weight_D.shape, weight_D.float(), eps).to(x_D.dtype)
        norm_1 = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True)
        return (x_D * norm_1.square_().add_(total).rsqrt_()).mul_(scaled_D)

    return function
