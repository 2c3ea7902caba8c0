"""From a tensor to FP8 numbers with scales: one scale for a tensor, or one for each block of 128.

An FP8 format has few exponents, so a tensor is multiplied by a scale that brings its largest magnitude (amax) to the
largest FP8 number, and products are divided by the scales again:

    tensor-wise    scale = max / amax / 2^margin             one for the tensor
    block 1×128    scale = 2^floor(log2(max / amax))         one for each 128 numbers along the contraction
    block 128×128  likewise                                  for weights

Formulas: Micikevicius et al. 2022 (arXiv 2209.05433), DeepSeek-V3 (arXiv 2412.19437, §3.3) and Transformer Engine's
recipes. `to_fp8` saturates: torch's own cast does so for E4M3 (448) but turns what E5M2 cannot hold into Inf. A tensor
with Inf or NaN in it becomes NaN, so that the step is skipped as it would be in BF16.

Legend: M rows, K contraction (last), I ⌈M/128⌉, J ⌈K/128⌉.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128
_FP32_EXPONENT = 0x7F800000


class Scaled(NamedTuple):
    """FP8 numbers and what to multiply them by: `inverse` is [] for a tensor, [M, J] for rows, [I, J] for tiles."""

    data_MK: Tensor
    inverse: Tensor

    def transposed(self) -> Scaled:
        """A view of the transposed matrix; only for whole tensors and tiles, which have no direction."""
        return Scaled(self.data_MK.t(), self.inverse.t() if self.inverse.dim() else self.inverse)


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x · scale, clamped to what `dtype` can hold and rounded to nearest even."""
    return (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def tensor_scale(amax: Tensor, largest: Tensor | float, margin: int = 0) -> Tensor:
    """Scale of a tensor with this largest magnitude; 1 for a tensor of zeros, 0 or NaN where amax is not finite."""
    scale = (largest / amax / 2.0**margin).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax == 0, 1.0, scale)


def by_tensor(x_MK: Tensor, scale: Tensor, dtype: torch.dtype) -> Scaled:
    return Scaled(to_fp8(x_MK, scale, dtype), scale.reciprocal())


def by_rows(x_MK: Tensor, dtype: torch.dtype) -> Scaled:
    """Blocks of 1×128; a last block that is not full counts as padded with zeros."""
    blocks_MJB = _padded(x_MK, 0, -x_MK.shape[1] % BLOCK).unflatten(1, (-1, BLOCK)).float()
    scale_MJ = block_scale(blocks_MJB.abs().amax(-1), dtype)
    data_MK = to_fp8(blocks_MJB, scale_MJ[..., None], dtype).flatten(1)[:, : x_MK.shape[1]]
    return Scaled(data_MK, scale_MJ.reciprocal())


def by_tiles(w_MK: Tensor, dtype: torch.dtype) -> Scaled:
    """Blocks of 128×128; both sides must be multiples of it (the conversion table sees to that)."""
    blocks_IBJB = w_MK.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale_IJ = block_scale(blocks_IBJB.abs().amax((1, 3)), dtype)
    data_MK = to_fp8(blocks_IBJB, scale_IJ[:, None, :, None], dtype).reshape(w_MK.shape)
    return Scaled(data_MK, scale_IJ.reciprocal())


def block_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two by which a block can be multiplied without overflow."""
    scale = tensor_scale(amax, LARGEST[dtype])
    return (scale.view(torch.int32) & _FP32_EXPONENT).view(torch.float32)


def dequantised(a: Scaled) -> Tensor:
    """The FP32 numbers that `a` stands for."""
    inverse = a.inverse
    if inverse.dim():
        rows, columns = a.data_MK.shape
        if inverse.shape[0] != rows:
            inverse = inverse.repeat_interleave(BLOCK, 0)[:rows]
        inverse = inverse.repeat_interleave(BLOCK, 1)[:, :columns]
    return a.data_MK.float() * inverse


def _padded(x_MK: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x_MK, (0, columns, 0, rows)) if rows or columns else x_MK
