"""BF16 on a CPU without BF16 instructions, where torch multiplies element by element, hundreds of times slower.

BF16 products are exact in FP32 and summed in FP32 either way, so multiplying as FP32 and rounding the result once is
the same operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what numbers of this dtype are multiplied: FP32 for BF16 where the CPU cannot, else the dtype itself."""
    slow = dtype == torch.bfloat16 and device.type == "cpu" and not MULTIPLIES_BF16
    return torch.float32 if slow else dtype


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, both of one dtype, which is the result's too."""
    wide = computed_in(x.dtype, x.device)
    return (x.to(wide) @ y.to(wide)).to(x.dtype)
