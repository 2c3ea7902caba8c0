"""Grouped matrix products for experts whose operands are gathered, activated and weighted while they are loaded.

A product of sorted copies by plain grouped kernels needs the copies in memory, the activation beside them, and sums of
gathered outputs: more traffic than the products themselves. Here the rows of tokens are read where they are, the
activation is computed on the way into the second product and its derivative on the way out of the backward one, and
outputs are written in token order.

    products   out[r] = A[r] · B[e]ᵀ       r: rows of expert e
    outer      out[e] = Σ_r A[r]ᵀ · B[r]   optionally added to what is there

Legend: R routed copies sorted by expert, K columns of A, N columns of the output, E experts, X tiles of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 128  # of a tile
SMALL_ROWS = 64  # where experts have few rows
INNER_BYTES = 128  # of a row of a tile that is multiplied; at most 112 KiB are shared (FP32 with a gate, three stages)


@triton.jit
def _activated(before_ptr, row, weight, column, inside, width, stride, GATED: tl.constexpr):
    """weight · act(b) of a tile, fp32; b [R, width] or, gated, [R, 2·width]."""
    place = before_ptr + row[:, None] * stride + column[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        second = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        value = first * tl.sigmoid(first) * second
    else:
        positive = tl.maximum(first, 0.0)
        value = positive * positive
    return value * weight[:, None]


@triton.jit
def _products(
    a_ptr,
    b_ptr,
    out_ptr,
    from_ptr,  # row of A of each copy; its own if not GATHER
    to_ptr,  # row of the output of each copy; its own if not SCATTER
    weight_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    N,
    K,
    stride_a,
    stride_be,
    stride_bn,
    stride_bk,
    stride_out,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ACTIVATE: tl.constexpr,  # A is b, of which weight · act is multiplied
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(1)
    expert, first, end = tl.load(expert_ptr + tile), tl.load(first_ptr + tile), tl.load(end_ptr + tile)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_R)
    valid = row < end
    source = tl.load(from_ptr + row, mask=valid, other=0) if GATHER else row
    source = source.to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    b_base = b_ptr + expert.to(tl.int64) * stride_be + column[None, :] * stride_bn
    if ACTIVATE:
        weight = tl.load(weight_ptr + row, mask=valid, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        b = tl.load(b_base + k[:, None] * stride_bk, mask=(k[:, None] < K) & (column[None, :] < N), other=0.0)
        inside = valid[:, None] & (k[None, :] < K)
        if ACTIVATE:
            a = _activated(a_ptr, source, weight, k, inside, K, stride_a, GATED).to(b.dtype)
        else:
            a = tl.load(a_ptr + source[:, None] * stride_a + k[None, :], mask=inside, other=0.0).to(b.dtype)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    target = tl.load(to_ptr + row, mask=valid, other=0) if SCATTER else row
    place = out_ptr + target.to(tl.int64)[:, None] * stride_out + column[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (column[None, :] < N))


@triton.jit
def _backward_products(
    grad_ptr,
    down_ptr,
    before_ptr,
    out_ptr,
    grad_weight_ptr,
    from_ptr,
    weight_ptr,
    expert_ptr,
    first_ptr,
    end_ptr,
    F,
    D,
    R,
    stride_grad,
    stride_de,
    stride_dd,
    stride_before,
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of b, from that of weight · act(b): grad[token] · down[e]. And of each weight, of which each
    column tile has a part."""
    tile = tl.program_id(1)
    expert, first, end = tl.load(expert_ptr + tile), tl.load(first_ptr + tile), tl.load(end_ptr + tile)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_R)
    valid = row < end
    source = tl.load(from_ptr + row, mask=valid, other=0).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    base = down_ptr + expert.to(tl.int64) * stride_de + column[None, :]
    sums = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + inner
        w = tl.load(base + k[:, None] * stride_dd, mask=(k[:, None] < D) & (column[None, :] < F), other=0.0)
        inside = valid[:, None] & (k[None, :] < D)
        g = tl.load(grad_ptr + source[:, None] * stride_grad + k[None, :], mask=inside, other=0.0).to(w.dtype)
        sums = tl.dot(g, w, sums, input_precision="ieee")
    inside = valid[:, None] & (column[None, :] < F)
    place = row.to(tl.int64)[:, None] * stride_before + column[None, :]
    weight = tl.load(weight_ptr + row, mask=valid, other=0.0).to(tl.float32)[:, None]
    first_b = tl.load(before_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        second_b = tl.load(before_ptr + place + F, mask=inside, other=0.0).to(tl.float32)
        opened = tl.sigmoid(first_b)
        silu = first_b * opened
        of_weight = sums * silu * second_b
        scaled = sums * weight
        tl.store(out_ptr + place + F, (scaled * silu).to(out_ptr.dtype.element_ty), mask=inside)
        found = scaled * second_b * opened * (1 + first_b - silu)
    else:
        positive = tl.maximum(first_b, 0.0)
        of_weight = sums * positive * positive
        found = sums * 2 * positive * weight
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)
    part = tl.sum(tl.where(inside, of_weight, 0.0), axis=1)
    tl.store(grad_weight_ptr + tl.program_id(0) * R + row, part, mask=valid)


@triton.jit
def _outer(
    a_ptr,
    b_ptr,
    out_ptr,
    from_a_ptr,
    from_b_ptr,
    weight_ptr,
    end_ptr,
    M,
    N,
    stride_a,
    stride_b,
    stride_out,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    ACTIVATE_B: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    expert = tl.program_id(2)
    end = tl.load(end_ptr + expert)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = row < end
        row_a = tl.load(from_a_ptr + row, mask=valid, other=0) if GATHER_A else row
        row_b = tl.load(from_b_ptr + row, mask=valid, other=0) if GATHER_B else row
        inside_a, inside_b = valid[:, None] & (m[None, :] < M), valid[:, None] & (n[None, :] < N)
        a = tl.load(a_ptr + row_a.to(tl.int64)[:, None] * stride_a + m[None, :], mask=inside_a, other=0.0)
        if ACTIVATE_B:
            weight = tl.load(weight_ptr + row, mask=valid, other=0.0).to(tl.float32)
            b = _activated(b_ptr, row_b.to(tl.int64), weight, n, inside_b, N, stride_b, GATED).to(a.dtype)
        else:
            b = tl.load(b_ptr + row_b.to(tl.int64)[:, None] * stride_b + n[None, :], mask=inside_b, other=0.0)
        sums = tl.dot(tl.trans(a), b.to(a.dtype), sums, input_precision="ieee")
    place = out_ptr + expert.to(tl.int64) * M * stride_out + m[:, None].to(tl.int64) * stride_out + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        sums += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=inside)


class Tiles:
    """Which rows each tile of `BLOCK_R` rows covers: all of one expert. Their number is an upper bound that the host
    knows; those too many have no rows."""

    def __init__(self, end_E: Tensor, rows: int) -> None:
        experts = len(end_E)
        self.height = ROWS if rows >= experts * ROWS else SMALL_ROWS
        self.number = rows // self.height + min(experts, rows)
        first_E = torch.cat([end_E.new_zeros(1), end_E[:-1]])
        tiles_E = (end_E - first_E + self.height - 1) // self.height
        last_E = tiles_E.cumsum(0)
        index_X = torch.arange(self.number, device=end_E.device)
        self.expert_X = torch.searchsorted(last_E, index_X, right=True).clamp(max=experts - 1)
        before_X = index_X - (last_E - tiles_E)[self.expert_X]
        self.first_X = (first_E[self.expert_X] + before_X * self.height).to(torch.int32)
        self.end_X = torch.where(index_X < last_E[-1], end_E[self.expert_X], 0).to(torch.int32)


def products(
    a: Tensor,
    b: Tensor,
    tiles: Tiles,
    rows: int,
    *,
    source_R: Tensor | None = None,
    target_R: Tensor | None = None,
    weight_R: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """out[target[r]] = A[source[r]] · B[e]ᵀ, [R, N].

    Args:
        b: [E, N, K], with any strides.
        weight_R: A is taken for b of `trainer.ops.activation` and weight · act(b) is multiplied.
    """
    _, columns, inner = b.shape
    out = a.new_empty(rows, columns)
    none = tiles.expert_X
    _products[(triton.cdiv(columns, COLUMNS), tiles.number)](
        a, b, out,
        none if source_R is None else source_R,
        none if target_R is None else target_R,
        none if weight_R is None else weight_R,
        tiles.expert_X, tiles.first_X, tiles.end_X,
        columns, inner, a.stride(0), b.stride(0), b.stride(1), b.stride(2), out.stride(0),
        GATHER=source_R is not None, SCATTER=target_R is not None, ACTIVATE=weight_R is not None, GATED=gated,
        BLOCK_R=tiles.height, BLOCK_N=COLUMNS, BLOCK_K=INNER_BYTES // a.itemsize, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def backward_products(
    grad_SD: Tensor, down_EDF: Tensor, before_RG: Tensor, tiles: Tiles, source_R: Tensor, weight_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of b [R, G] and of the weights, fp32 [R], of y[token] += weight · act(b) · down[e]ᵀ."""
    rows, width = before_RG.shape
    _, depth, columns = down_EDF.shape
    out = torch.empty_like(before_RG)
    parts = triton.cdiv(columns, COLUMNS)
    of_weight = torch.empty(parts, rows, dtype=torch.float32, device=out.device)
    _backward_products[(parts, tiles.number)](
        grad_SD, down_EDF, before_RG, out, of_weight, source_R, weight_R, tiles.expert_X, tiles.first_X, tiles.end_X,
        columns, depth, rows, grad_SD.stride(0), down_EDF.stride(0), down_EDF.stride(1), before_RG.stride(0),
        GATED=width != columns, BLOCK_R=tiles.height, BLOCK_N=COLUMNS, BLOCK_K=INNER_BYTES // grad_SD.itemsize,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out, of_weight.sum(0)


def outer(
    a: Tensor,
    b: Tensor,
    end_E: Tensor,
    out: Tensor,
    *,
    source_a_R: Tensor | None = None,
    source_b_R: Tensor | None = None,
    weight_R: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """out[e] = Σ over the rows of expert e of A[source_a[r]]ᵀ · B[source_b[r]], plus what is there with `add`.

    Args:
        out: [E, M, N], contiguous; sums are fp32 until they are stored.
        weight_R: as in `products`, of B.
    """
    experts, rows, columns = out.shape
    none = end_E
    # An FP32 tile that is activated on its way takes so many registers that a large one would live in local memory.
    wide = weight_R is not None and a.dtype == torch.float32
    block_m, block_n = (64, 64) if wide else (ROWS, COLUMNS)
    _outer[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m), experts)](
        a, b, out,
        none if source_a_R is None else source_a_R,
        none if source_b_R is None else source_b_R,
        none if weight_R is None else weight_R,
        end_E, rows, columns, a.stride(0), b.stride(0), out.stride(1),
        GATHER_A=source_a_R is not None, GATHER_B=source_b_R is not None, ACTIVATE_B=weight_R is not None,
        GATED=weight_R is not None and b.shape[1] != columns, ADD=add,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=INNER_BYTES // a.itemsize, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
