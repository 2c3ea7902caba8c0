"""Weights as INT8 or FP8 (E4M3) with a scale for each output channel, and products with them.

    scale_o = max_i |w_oi| / m        q_oi = w_oi / scale_o, rounded to nearest        m = 127 or 448

of a row o of a matrix, or of each matrix of a stack. So |scale_o · q_oi - w_oi| is at most scale_o / 2 in INT8; in FP8
it is at most |w_oi| / 16 where q is a normal number of E4M3, and scale_o / 1024 below. Only weights are rounded: a
product multiplies x by the numbers q, and the result by the scales.

Products convert the matrix to the dtype of x, except for INT8 on a CPU with AVX2 or AVX-512, where torch has a kernel.
It takes x and gives the result in BF16, as BF16 autocast does, which adds less error than INT8 has itself, and it
computes each row of x alike however many there are.

Legend: S tokens, K experts chosen for each, E experts, O outputs, I inputs, D hidden, F expert width, r copies of one
expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import local
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in

Kind = Literal["int8", "fp8"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
STEP = 32  # the kernel reads beyond the end of rows that are no multiple of 16
ALIGNMENT, ALIGNMENT_X = 16, 64  # bytes at multiples of which q and x must begin, else the kernel ends the process
_FP16_FACTOR = 2.0**8  # of an E4M3 number to the FP16 number with the same bits: exponents begin at -7 and -15
_NOT_BIT_14 = -(2**14) - 1
_memory = local()


class Quantised(NamedTuple):
    """A matrix or a stack of them: numbers [E, O, I] or [O, I], and FP32 scales [E, O] or [O]."""

    numbers: Tensor
    scale: Tensor


def quantise(weight: Tensor, kind: Kind) -> Quantised:
    """
    Raises:
        ValueError: the weight has Inf or NaN.
    """
    dtype = DTYPES[kind]
    largest = weight.float().abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("has numbers that are not finite")
    scale = (largest / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    q = weight.float() / scale[..., None]
    q = q.round_() if dtype == torch.int8 else q
    return Quantised(q.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale)


def dequantised(weight: Quantised) -> Tensor:
    """The FP32 numbers that it stands for."""
    return weight.numbers.float() * weight.scale[..., None]


def product(x: Tensor, weight: Quantised, bias: Tensor | None = None) -> Tensor:
    """x·wᵀ + b with a matrix, in the dtype of products on x."""
    q_OI, scale_O = weight
    dtype = compute_dtype(x)
    if packed(q_OI):
        x_SI = aligned(x.reshape(-1, x.shape[-1]).bfloat16(), ALIGNMENT_X)
        y = (torch._weight_int8pack_mm(x_SI, q_OI, _ones(q_OI.shape[0])) * scale_O).view(*x.shape[:-1], -1)
    else:
        with torch.autocast(x.device.type, enabled=False):
            wide = computed_in(dtype, x.device)
            matrix_OI, factor = _converted(q_OI, wide)
            y = F.linear(x.to(dtype).to(wide), matrix_OI) * (scale_O * factor)
    return (y if bias is None else y + bias).to(dtype)


def packed(q_OI: Tensor) -> bool:
    """Whether torch's kernel multiplies with these numbers."""
    fits = q_OI.shape[-1] % STEP == 0 and q_OI.data_ptr() % ALIGNMENT == 0
    return q_OI.dtype == torch.int8 and q_OI.device.type == "cpu" and fits and _kernel_works()


def aligned(tensor: Tensor, size: int = ALIGNMENT) -> Tensor:
    """The tensor, copied if it lies where the kernel cannot read it, as tensors of a file may."""
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % size == 0 else tensor.clone()


@cache
def _kernel_works() -> bool:
    """It is private in torch, so its result is checked, once."""
    if not hasattr(torch, "_weight_int8pack_mm") or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    q_OI = torch.arange(-80, 80, dtype=torch.int8).view(5, STEP)
    x_SI = torch.arange(6 * STEP).remainder(5).view(6, STEP)
    try:
        with torch.autocast("cpu", enabled=False):
            y_SO = torch._weight_int8pack_mm(x_SI.bfloat16(), q_OI, _ones(5))
    except (RuntimeError, TypeError):
        return False
    return torch.equal(y_SO, (x_SI @ q_OI.long().T).bfloat16())


@cache
def _ones(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(count, dtype=torch.bfloat16)


def _converted(q_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The numbers in another dtype, and what they still have to be multiplied by. Valid until the next call.

    On a CPU in memory that is used again: pages that are new each time cost more than the product.
    """
    if q_OI.device.type != "cpu":
        return q_OI.to(dtype), 1.0
    factor = 1.0
    if q_OI.dtype == torch.float8_e4m3fn:  # torch's conversion takes five times as long
        bits_OI = q_OI.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_NOT_BIT_14)
        q_OI, factor = bits_OI.view(torch.float16), _FP16_FACTOR
    room: Tensor | None = getattr(_memory, str(dtype), None)
    if room is None or room.numel() < q_OI.numel():
        with torch.inference_mode(False):
            room = torch.empty(q_OI.numel(), dtype=dtype)
        setattr(_memory, str(dtype), room)
    return room[: q_OI.numel()].view(q_OI.shape).copy_(q_OI), factor


def experts(first: Quantised, down: Quantised, activation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function (x_SD, expert_SK, weight_SK) → [S, D] as `trainer.ops.experts.experts_reference`, without gradient.

    Only chosen experts are visited, one after the other.
    """
    activate = ACTIVATIONS[activation].value
    firsts, downs = ([Quantised(*pair) for pair in zip(*stack, strict=True)] for stack in (first, down))

    def run(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
        top_k = expert_SK.shape[1]
        y_SD = torch.zeros_like(x_SD, dtype=torch.float32)
        if len(x_SD) == 1:
            for e, weight in zip(expert_SK[0].tolist(), weight_SK[0].tolist(), strict=True):
                y_SD.add_(product(activate(product(x_SD, firsts[e])), downs[e]), alpha=weight)
            return y_SD.to(compute_dtype(x_SD))
        order_R = expert_SK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_SK.flatten(), minlength=len(firsts)).tolist()
        for e, copy_r in enumerate(order_R.split(counts)):
            if len(copy_r):
                token_r = copy_r // top_k
                y_rD = product(activate(product(x_SD[token_r], firsts[e])), downs[e]).float()
                y_SD.index_add_(0, token_r, y_rD * weight_SK.flatten()[copy_r, None])
        return y_SD.to(compute_dtype(x_SD))

    return run
