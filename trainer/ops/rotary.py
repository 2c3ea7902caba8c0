"""Rotary position embedding (Su et al. 2021), with scaling for rows longer than a model was trained on.

Legend: B rows, T positions, H heads, W head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.kinds.base import Rotation


def rates(rotation: Rotation, device: torch.device | str = "cpu") -> Tensor:
    """Radians by which each pair of channels turns from one position to the next, fp32 [W/2]; the fastest first."""
    theta, width, scaling = rotation
    rate_W = 1 / theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    if scaling is None:
        return rate_W
    if scaling.kind == "linear":
        return rate_W / scaling.factor
    assert scaling.original_length is not None
    length = scaling.original_length
    if scaling.kind == "llama3":
        # By turns within the original length: few are slowed down, many stay, between the two it passes over.
        turns_W = rate_W * (length / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        stays_W = ((turns_W - low) / (high - low)).clamp(0, 1)
    else:
        # By channels, between those that make `beta_fast` and `beta_slow` turns, rounded outwards to whole ones.
        def channel(turns: float) -> float:
            return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(channel(scaling.beta_fast)), 0)
        last = min(math.ceil(channel(scaling.beta_slow)), width - 1)
        channel_W = torch.arange(width // 2, device=device, dtype=torch.float32)
        stays_W = 1 - ((channel_W - first) / max(last - first, 1e-3)).clamp(0, 1)
    return rate_W * stays_W + rate_W / scaling.factor * (1 - stays_W)


def turns(position_BT: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, fp32 [B, T, 1, W/2], times the amplitude of queries and keys.

    Positions restart in each document. Only their differences enter the scores, so the result is the same as with
    positions in the row, but the angles are rounded as if the document were alone.
    """
    angle_BT1W = (position_BT[..., None].float() * rates(rotation, position_BT.device))[:, :, None]
    cos_BT1W, sin_BT1W = angle_BT1W.cos(), angle_BT1W.sin()
    if rotation.scaling is None or rotation.scaling.amplitude == 1:
        return cos_BT1W, sin_BT1W
    return cos_BT1W * rotation.scaling.amplitude, sin_BT1W * rotation.scaling.amplitude


def rotate(x_BTHW: Tensor, cos_BT1W: Tensor, sin_BT1W: Tensor) -> Tensor:
    """Queries or keys turned by their positions, pairs of channels W/2 apart, in fp32."""
    first, second = x_BTHW.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_BT1W - second * sin_BT1W, second * cos_BT1W + first * sin_BT1W], dim=-1)
    return turned.to(x_BTHW.dtype)
