"""RMSNorm and the gated, grouped RMSNorm of Mamba-2; statistics in fp32, no bias.

Legend: D width, G groups, W width of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        return F.rms_norm(x_D.float(), self.weight.shape, self.weight.float(), self.eps).to(x_D.dtype)


class GatedRMSNorm(nn.Module):
    """First y · silu(z), then RMSNorm within each of `num_groups` groups of channels, as Mamba-2 does."""

    def __init__(self, width: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, y_D: Tensor, z_D: Tensor) -> Tensor:
        gated_GW = (y_D.float() * F.silu(z_D.float())).unflatten(-1, (self.num_groups, -1))
        normed_GW = F.rms_norm(gated_GW, gated_GW.shape[-1:], None, self.eps)
        return (normed_GW.flatten(-2) * self.weight.float()).to(y_D.dtype)
