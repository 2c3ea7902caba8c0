"""RMSNorm and the gated, grouped RMSNorm of Mamba-2; statistics in fp32, no bias.

They have hand-written gradients, so that each norm keeps only its inputs and one number per group, in one dtype:
torch's composite keeps several fp32 copies.

Legend: D width, G groups, W width of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.add_norm import gradients, rms_norm, scale
from trainer.ops.experts import compute_dtype


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32.

    The result has the dtype of the matrix products that read it, so that they share one cast.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        return rms_norm(x_D, self.weight, self.eps)

    def without_gradient(self, x_D: Tensor) -> Tensor:
        """The same up to rounding, in one operation."""
        return F.rms_norm(x_D.float(), self.weight.shape, self.weight, self.eps).to(compute_dtype(x_D))


class GatedRMSNorm(nn.Module):
    """First y · silu(z), then RMSNorm within each of `num_groups` groups of channels, as Mamba-2 does."""

    def __init__(self, width: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, y_D: Tensor, z_D: Tensor) -> Tensor:
        return _GatedRMSNorm.apply(y_D, z_D, self.weight, self.num_groups, self.eps)

    def without_gradient(self, y_D: Tensor, z_D: Tensor) -> Tensor:
        """The same up to rounding, in few operations."""
        gated_GW = (F.silu(z_D.float()) * y_D).unflatten(-1, (self.num_groups, -1))
        normed_GW = F.rms_norm(gated_GW, gated_GW.shape[-1:], None, self.eps)
        return (normed_GW.flatten(-2) * self.weight).to(y_D.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y_D: Tensor, z_D: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
        gated_GW = (F.silu(z_D.float()) * y_D).unflatten(-1, (num_groups, -1))
        scale_G1 = scale(gated_GW, eps)
        ctx.save_for_backward(y_D, z_D, weight_D, scale_G1)
        return gated_GW.mul_(scale_G1).flatten(-2).mul_(weight_D).to(y_D.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_D: Tensor) -> tuple[Tensor | None, ...]:
        y_D, z_D, weight_D, scale_G1 = ctx.saved_tensors
        groups = (*scale_G1.shape[-2:-1], -1)
        z_D_wide = z_D.float()
        open_D = torch.sigmoid(z_D_wide)
        silu_D = z_D_wide * open_D
        normed_GW = (silu_D * y_D).unflatten(-1, groups).mul_(scale_G1)
        weight_GW = weight_D.float().unflatten(-1, groups)
        grad_GW = grad_D.float().unflatten(-1, groups)
        grad_gated_GW, grad_weight_GW = gradients(grad_GW, normed_GW, scale_G1, weight_GW)
        grad_gated_D = grad_gated_GW.flatten(-2)
        grad_y_D = (grad_gated_D * silu_D).to(y_D.dtype)
        slope_D = (1 + z_D_wide).sub_(silu_D).mul_(open_D)
        grad_z_D = (grad_gated_D * y_D).mul_(slope_D).to(z_D.dtype)
        return grad_y_D, grad_z_D, grad_weight_GW.flatten().to(weight_D.dtype), None, None
