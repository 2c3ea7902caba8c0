"""Products of FP8 operands, and where each implementation can run.

    emulated   FP32 products of the FP8 numbers, on any device: the definition
    torch      torch's scaled GEMMs (cuBLASLt), compute capability 8.9 on; 128-blocks only on 9.x

`product(a, b)` is a·bᵀ: both operands have the contraction last, as the tensor cores want them (row-major times
column-major). Sides must be multiples of 16; the number of tokens is padded with zeros where it is the contraction.

Legend: M, N rows of the operands, K contraction, G ⌈N/128⌉, J ⌈K/128⌉.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.fp8.scaling import BLOCK, E4M3, Scaled, dequantised

ALIGNMENT = 16


def product_emulated(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """FP32 sums of exact products, scaled afterwards as the hardware does, rounded once to `dtype`."""
    if a.inverse.dim():
        return (dequantised(a) @ dequantised(b).t()).to(dtype)
    return ((a.data_MK.float() @ b.data_MK.float().t()) * (a.inverse * b.inverse)).to(dtype)


def product_torch(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """`fast` sums with fewer bits on Hopper (forward only, as Transformer Engine does); 128-blocks never."""
    if not a.inverse.dim():
        a_MK, b_KN = aligned(a.data_MK, ALIGNMENT), aligned(b.data_MK, ALIGNMENT).t()
        return torch._scaled_mm(a_MK, b_KN, a.inverse, b.inverse, out_dtype=dtype, use_fast_accum=fast)
    a_MK, b_KN = aligned(a.data_MK, BLOCK), aligned(b.data_MK, BLOCK).t()
    kinds = F.ScalingType
    tiles = b.inverse.shape[0] != b.data_MK.shape[0]
    rows = a_MK.shape[0]
    missing = -rows % 4  # the scales of one column of blocks start at a multiple of 16 bytes
    if missing:
        a_MK = F.pad(a_MK.view(torch.uint8), (0, 0, 0, missing)).view(a_MK.dtype)
    y_MN = F.scaled_mm(
        a_MK,
        b_KN,
        outer_major(F.pad(a.inverse, (0, 0, 0, missing))),
        kinds.BlockWise1x128,
        inner_major(b.inverse) if tiles else outer_major(b.inverse),
        kinds.BlockWise128x128 if tiles else kinds.BlockWise1x128,
        output_dtype=dtype,
    )
    return y_MN[:rows]


PRODUCTS = {"emulated": product_emulated, "torch": product_torch}


def aligned(data_MK: Tensor, multiple: int) -> Tensor:
    """Row-major copy with the contraction padded with zeros to a multiple of this."""
    missing = -data_MK.shape[1] % multiple
    if missing:
        data_MK = F.pad(data_MK.view(torch.uint8), (0, missing)).view(data_MK.dtype)  # few operations support FP8
    return data_MK.contiguous()


def outer_major(inverse_MJ: Tensor) -> Tensor:
    """[M, J] with strides (1, M), as cuBLASLt reads the scales of 1×128 blocks."""
    return inverse_MJ.t().contiguous().t()


def inner_major(inverse_GJ: Tensor) -> Tensor:
    """[J', G] with strides (1, J'), J' = J rounded up to 4: the scales of 128×128 blocks of the second operand."""
    return F.pad(inverse_GJ, (0, -inverse_GJ.shape[1] % 4)).contiguous().t()


def torch_problem(recipe: str, gradient: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Why torch's scaled GEMMs cannot run this recipe; None if they can."""
    if capability is None:
        return "there is no GPU"
    have = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"{have}, FP8 needs 8.9"
    if recipe != "block128":
        return None
    if capability[0] != 9:
        return f"{have}, torch's {BLOCK}-block products need 9.x"
    if gradient is not E4M3:
        return f"torch's {BLOCK}-block products take E4M3 only; write train.precision.fp8.format e4m3"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
    if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"torch is built with CUDA {torch.version.cuda}, {BLOCK}-block products need 12.9"
    return None
