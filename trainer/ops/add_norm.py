"""The residual addition and the RMSNorm of the next sublayer: (x, y) → (x + y, norm(x + y) · weight).

Statistics in fp32. The norm has the dtype of the matrix products that read it, so that they share one cast.

Legend: D width, W width of a group (of all of D here).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.experts import compute_dtype


def add_norm_reference(x_D: Tensor, y_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition. Returns the sum, which is x itself without y, and its norm times the weight."""
    sum_D = x_D if y_D is None else x_D + y_D
    wide_D = sum_D.float()
    normed_D = wide_D / (wide_D.square().mean(-1, keepdim=True) + eps).sqrt()
    return sum_D, (normed_D * weight_D).to(compute_dtype(sum_D))


def add_norm_torch(x_D: Tensor, y_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_norm_reference`; keeps for the backward pass only the sum and one number per token."""
    sum_D = x_D if y_D is None else x_D + y_D
    return sum_D, rms_norm(sum_D, weight_D, eps)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension, in the dtype of products."""
    return _RMSNorm.apply(x_D, weight_D, eps, compute_dtype(x_D))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_D: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide_D = x_D.float()
        scale_1 = scale(wide_D, eps)
        ctx.save_for_backward(x_D, weight_D, scale_1)
        return (wide_D * scale_1).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_D: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D, scale_1 = ctx.saved_tensors
        normed_D = x_D.float() * scale_1
        grad_x_D, grad_weight_D = gradients(grad_D.float(), normed_D, scale_1, weight_D.float())
        return grad_x_D.to(x_D.dtype), grad_weight_D.to(weight_D.dtype), None, None


def scale(x_W: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x²) + eps) over the last dimension, which stays with size 1."""
    length_1 = torch.linalg.vector_norm(x_W, dim=-1, keepdim=True)
    return torch.rsqrt(length_1.square() / x_W.shape[-1] + eps)


def gradients(grad_W: Tensor, normed_W: Tensor, scale_1: Tensor, weight_W: Tensor) -> tuple[Tensor, Tensor]:
    """Of the input and of the weight, for the output normed · weight, where normed = input · scale; all fp32."""
    by_weight_W = grad_W * normed_W
    grad_weight_W = by_weight_W.flatten(0, -1 - weight_W.dim()).sum(0)
    along_1 = (by_weight_W.mul_(weight_W)).sum(-1, keepdim=True) / normed_W.shape[-1]
    grad_input_W = (grad_W * weight_W).addcmul_(normed_W, along_1, value=-1).mul_(scale_1)
    return grad_input_W, grad_weight_W
