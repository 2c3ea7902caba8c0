"""The activation between the two matrix products of an MLP or an expert, with its gradient.

    relu2     h = relu(b)²                          b [F]         (So et al. 2021)
    swiglu    h = silu(g) · u      b = [g ; u]      b [2·F]       (Shazeer 2020)

The functions for experts take the weight of each routed copy and multiply h by it, because h is narrower than the
output. They keep only b.

Legend: R rows, F width of h, G width of b, 1 one number a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Activation(NamedTuple):
    """
    Attributes:
        value: h of b; for autograd.
        weighted: weight · h, as a new tensor.
        gradients: of b and of the weights (fp32 [R]), from b, the gradient of weight · h, which it may overwrite, and
            the weights.
    """

    value: Callable[[Tensor], Tensor]
    weighted: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _relu2(before_RF: Tensor) -> Tensor:
    return F.relu(before_RF).square()


def _relu2_weighted(before_RF: Tensor, weight_R1: Tensor) -> Tensor:
    return F.relu(before_RF).square_().mul_(weight_R1)


def _relu2_gradients(before_RF: Tensor, grad_RF: Tensor, weight_R1: Tensor) -> tuple[Tensor, Tensor]:
    positive_RF = F.relu(before_RF)
    slope_RF = grad_RF * positive_RF  # of h, less the factors 2 and weight
    grad_weight_R = (slope_RF.float() * positive_RF.float()).sum(1)
    return slope_RF.mul_(2 * weight_R1), grad_weight_R


def swiglu(before_RG: Tensor) -> Tensor:
    """silu(g) · u of b = [g ; u], computed in fp32, in the dtype of b."""
    return _SwiGlu.apply(before_RG)


def _swiglu_weighted(before_RG: Tensor, weight_R1: Tensor) -> Tensor:
    gate_RF, up_RF = before_RG.float().chunk(2, dim=-1)
    return (F.silu(gate_RF).mul_(up_RF).mul_(weight_R1)).to(before_RG.dtype)


def _swiglu_gradients(before_RG: Tensor, grad_RF: Tensor, weight_R1: Tensor) -> tuple[Tensor, Tensor]:
    gate_RF, up_RF = before_RG.float().chunk(2, dim=-1)
    open_RF = torch.sigmoid(gate_RF)
    silu_RF, grad_RF = gate_RF * open_RF, grad_RF.float()
    grad_weight_R = (grad_RF * silu_RF * up_RF).sum(1)
    return _by_halves(gate_RF, up_RF, open_RF, silu_RF, grad_RF * weight_R1).to(before_RG.dtype), grad_weight_R


def _by_halves(gate_RF: Tensor, up_RF: Tensor, open_RF: Tensor, silu_RF: Tensor, grad_RF: Tensor) -> Tensor:
    """Gradients of gate and up, side by side."""
    slope_RF = (1 + gate_RF).sub_(silu_RF).mul_(open_RF)  # of silu
    return torch.cat([(grad_RF * up_RF).mul_(slope_RF), grad_RF * silu_RF], dim=-1)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, before_RG: Tensor) -> Tensor:
        ctx.save_for_backward(before_RG)
        gate_RF, up_RF = before_RG.float().chunk(2, dim=-1)
        return (F.silu(gate_RF).mul_(up_RF)).to(before_RG.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_RF: Tensor) -> Tensor:
        (before_RG,) = ctx.saved_tensors
        gate_RF, up_RF = before_RG.float().chunk(2, dim=-1)
        open_RF = torch.sigmoid(gate_RF)
        return _by_halves(gate_RF, up_RF, open_RF, gate_RF * open_RF, grad_RF.float()).to(before_RG.dtype)


ACTIVATIONS = {
    "relu2": Activation(_relu2, _relu2_weighted, _relu2_gradients),
    "swiglu": Activation(swiglu, _swiglu_weighted, _swiglu_gradients),
}
