"""Engram's look-up in one kernel: n-grams hashed, their rows found and cast.

In single operations it is a dozen launches over integers, then a gather in FP32 and a cast for each product that reads
it.

Legend: S tokens of all rows, T positions of a row, N tokens of the longest n-gram, J tables, W row width, M = J·W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kinds.ngrams import PAD_TOKEN

BLOCK_S = 32
WIDEST = 128  # columns of a block
PAD = tl.constexpr(PAD_TOKEN)


@triton.jit
def _forward(
    id_ptr,
    document_ptr,
    class_ptr,
    multiplier_ptr,
    prime_ptr,
    offset_ptr,
    table_ptr,
    row_ptr,
    out_ptr,
    S,
    T,
    J,
    W,
    heads,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Some tokens in one table: neighbouring programs read the same table. Integers are below 2⁶³, see
    `trainer.ops.engram`: the remainder, which has the sign of the dividend here, is that of torch."""
    s, j = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), tl.program_id(1)
    inside = s < S
    document = tl.load(document_ptr + s, mask=inside, other=0)
    mixed = tl.load(class_ptr + tl.load(id_ptr + s, mask=inside, other=PAD)) * tl.load(multiplier_ptr)
    # How far back the n-grams of this table go; a block, as Triton 3.9's interpreter makes integers of a single bit.
    last = tl.zeros((BLOCK_S,), dtype=tl.int32) + (j // heads + 1)
    for back in tl.static_range(1, N):
        wanted = last >= back
        reaches = inside & wanted & (s % T >= back)
        same = reaches & (tl.load(document_ptr + s - back, mask=reaches, other=0) == document)
        earlier = tl.load(class_ptr + tl.load(id_ptr + s - back, mask=same, other=PAD))
        mixed = tl.where(wanted, mixed ^ (earlier * tl.load(multiplier_ptr + back)), mixed)
    row = mixed % tl.load(prime_ptr + j) + tl.load(offset_ptr + j)
    at = s.to(tl.int64) * J + j
    tl.store(row_ptr + at, row, mask=inside)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        cell = inside[:, None] & (w[None, :] < W)
        value = tl.load(table_ptr + row[:, None] * W + w[None, :], mask=cell, other=0.0)
        tl.store(out_ptr + at[:, None] * W + w[None, :], value.to(out_ptr.dtype.element_ty), mask=cell)


def forward(
    ids_BT: Tensor,
    seq_idx_BT: Tensor,
    class_V: Tensor,
    multiplier_N: Tensor,
    prime_J: Tensor,
    offset_J: Tensor,
    table_RW: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `trainer.ops.engram.engram_reference`, in `dtype`, and the rows [B, T, J] int64. All contiguous."""
    tokens, tables, width, orders = ids_BT.numel(), prime_J.numel(), table_RW.shape[1], multiplier_N.numel()
    row_BTJ = torch.empty(*ids_BT.shape, tables, dtype=torch.int64, device=ids_BT.device)
    out_BTM = torch.empty(*ids_BT.shape, tables * width, dtype=dtype, device=ids_BT.device)
    _forward[(triton.cdiv(tokens, BLOCK_S), tables)](
        ids_BT, seq_idx_BT, class_V, multiplier_N, prime_J, offset_J, table_RW, row_BTJ, out_BTM,
        tokens, ids_BT.shape[1], tables, width, tables // (orders - 1),
        N=orders, BLOCK_S=BLOCK_S, BLOCK_W=min(WIDEST, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return out_BTM, row_BTJ
