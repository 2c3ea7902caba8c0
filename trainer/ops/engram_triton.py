"""Engram's look-up by a Triton kernel of our own (trainer/kernels/engram.py); the gradient of the tables is torch's.

The forward pass is an operator, which torch.compile keeps whole. Legend as in `trainer.ops.engram`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.documents import Documents
from trainer.ops.engram import Hash
from trainer.ops.experts import compute_dtype
from trainer.ops.setting import Setting

MODULE = "triton"


def engram_triton(ids_BT: Tensor, documents: Documents, hash: Hash, table_RW: Tensor) -> Tensor:
    """See `engram_reference`; in the dtype of matrix products, so that those that read it share one cast."""
    return _engram(ids_BT, documents.seq_idx_BT, *hash, table_RW, compute_dtype(table_RW))[0]


def unsupported(setting: Setting) -> str | None:
    """None where the kernel runs: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
    if (reason := setting.own_kernels()) is not None:
        return reason
    return packages.problem(packages.load(MODULE))


@torch.library.custom_op("yaongi::engram", mutates_args=())
def _engram(
    ids: Tensor,
    seq_idx: Tensor,
    classes: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    table: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the rows hold, [B, T, M], and the rows, [B, T, J] int64."""
    from trainer.kernels import engram

    hash = classes, multipliers, primes, offsets  # contiguous, as they are buffers
    return engram.forward(ids.contiguous(), seq_idx.contiguous(), *hash, table.contiguous(), dtype)


@_engram.register_fake
def _(
    ids: Tensor, seq_idx: Tensor, classes: Tensor, multipliers: Tensor, primes: Tensor, offsets: Tensor, table: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tables, width = primes.shape[0], table.shape[1]
    return table.new_empty(*ids.shape, tables * width, dtype=dtype), ids.new_empty(*ids.shape, tables)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    table, rows = inputs[6], output[1]
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = table.shape, table.dtype
    ctx.save_for_backward(rows)


def _backward(ctx: FunctionCtx, grad: Tensor | None, _rows: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    (rows,) = ctx.saved_tensors
    count, width = ctx.shape
    # Many tokens may share a row: their gradients are added in the dtype of the table.
    grad = grad.to(ctx.dtype).reshape(*rows.shape, width)
    summed = torch.ops.aten.embedding_dense_backward(grad, rows, count, -1, False)
    return None, None, None, None, None, None, summed, None


_engram.register_autograd(_backward, setup_context=_save)
