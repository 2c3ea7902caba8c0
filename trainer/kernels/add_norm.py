"""The residual addition and the RMSNorm that follows it, in one pass over memory each way.

Alone they are an addition, two passes of the norm and, on the way back, the sum of two gradients: twice the traffic.

Legend: N tokens, D width, P programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # of the backward pass; each sums the gradient of the weight over its tokens, in a fixed order


@triton.jit
def _forward(x_ptr, y_ptr, w_ptr, sum_ptr, out_ptr, scale_ptr, D, eps, ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token. `ADD`: y is added, and the sum is stored."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        narrow = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + d, narrow, mask=inside)
        x = narrow.to(tl.float32)  # the norm is of what later layers see
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    w = tl.load(w_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, (x * scale * w).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _backward(
    grad_out_ptr, grad_sum_ptr, sum_ptr, w_ptr, scale_ptr, grad_x_ptr, grad_w_ptr,
    N, D, ADD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every P-th token. `ADD`: the gradient that reaches the sum past the norm is added."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    w = tl.load(w_ptr + d, mask=inside, other=0.0).to(tl.float32)
    grad_w = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for number in range(program, N, programs):
        row = tl.cast(number, tl.int64)
        scale = tl.load(scale_ptr + row)
        normed = tl.load(sum_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_out_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        grad_w += grad * normed
        weighted = grad * w
        along = tl.sum(weighted * normed, axis=0) / D
        found = (weighted - normed * along) * scale
        if ADD:
            found += tl.load(grad_sum_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * D + d, found.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_w_ptr + program * D + d, grad_w, mask=inside)


def forward(
    x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float, sum_: Tensor, out: Tensor, scale: Tensor
) -> None:
    """Fill `sum_` with x + y (not without y), `out` with the norm times the weight, `scale` with the norm's factor.

    All are contiguous; x, y, sum_ and out [..., D], scale [...] in fp32.
    """
    width = weight_D.shape[0]
    _forward[(scale.numel(),)](
        x, x if y is None else y, weight_D, x if y is None else sum_, out, scale, width, eps,
        ADD=y is not None, BLOCK_D=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_sum: Tensor | None, sum_: Tensor, weight_D: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of both summands, in the dtype of the sum, and of the weight."""
    tokens, width = scale.numel(), weight_D.shape[0]
    programs = max(1, min(PROGRAMS, tokens))
    grad_x = sum_.new_empty(sum_.shape)
    grad_w_PD = torch.empty(programs, width, dtype=torch.float32, device=sum_.device)
    _backward[(programs,)](
        grad_out, sum_ if grad_sum is None else grad_sum, sum_, weight_D, scale, grad_x, grad_w_PD, tokens, width,
        ADD=grad_sum is not None, BLOCK_D=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return grad_x, grad_w_PD.sum(0).to(weight_D.dtype)
