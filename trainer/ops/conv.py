"""Causal depthwise convolution over time, reset at each document.

y[t] = bias + Σ_k w[K-1-k] · x[t - k·dilation], where taps that fall before the document of t count as zero. The last
weight multiplies the current position, as in torch's Conv1d with left padding.

Legend: B rows, T positions, C channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.documents import Documents


def conv_reference(
    x_BTC: Tensor, w_CK: Tensor, bias_C: Tensor | None, documents: Documents, dilation: int = 1
) -> Tensor:
    """The definition, position by position."""
    num_taps = w_CK.shape[1]
    columns = []
    for t in range(x_BTC.shape[1]):
        y_BC = torch.zeros_like(x_BTC[:, t]) if bias_C is None else bias_C.expand_as(x_BTC[:, t])
        for k in range(num_taps):
            source = t - k * dilation
            if source >= 0:
                same_B1 = documents.seq_idx_BT[:, source, None] == documents.seq_idx_BT[:, t, None]
                y_BC = y_BC + torch.where(same_B1, x_BTC[:, source] * w_CK[:, num_taps - 1 - k], 0)
        columns.append(y_BC)
    return torch.stack(columns, dim=1)


def conv_torch(x_BTC: Tensor, w_CK: Tensor, bias_C: Tensor | None, documents: Documents, dilation: int = 1) -> Tensor:
    """The same as K shifted multiply-adds over whole tensors; keeps only x for the backward pass."""
    shifts = range(dilation, dilation * w_CK.shape[1], dilation)
    masks = [] if documents.whole_rows else [documents.same_BT(shift)[:, :, None] for shift in shifts]
    return _ShiftedConv.apply(
        x_BTC, w_CK.to(x_BTC.dtype), None if bias_C is None else bias_C.to(x_BTC.dtype), dilation, *masks
    )


class _ShiftedConv(torch.autograd.Function):
    """Taps as shifts of time: tap k reads x[t - k·dilation] where mask k holds; no masks: wherever the row has it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_BTC: Tensor, w_CK: Tensor, bias_C: Tensor | None, dilation: int, *masks: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BTC, w_CK, *masks)
        ctx.dilation, ctx.has_bias = dilation, bias_C is not None
        num_taps, length = w_CK.shape[1], x_BTC.shape[1]
        y_BTC = x_BTC * w_CK[:, -1]
        if bias_C is not None:
            y_BTC += bias_C
        for k in range(1, num_taps):
            shift = k * dilation
            if shift < length:
                tap_C = w_CK[:, num_taps - 1 - k]
                seen_BTC = x_BTC[:, : length - shift]
                if masks:
                    seen_BTC = torch.where(masks[k - 1][:, shift:], seen_BTC, 0)
                y_BTC[:, shift:].addcmul_(seen_BTC, tap_C)
        return y_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, w_CK, *masks = ctx.saved_tensors
        num_taps, length = w_CK.shape[1], x_BTC.shape[1]
        grad_x_BTC = grad_BTC * w_CK[:, -1]
        grad_w_CK = torch.zeros_like(w_CK)
        grad_w_CK[:, -1] = (grad_BTC * x_BTC).sum((0, 1))
        for k in range(1, num_taps):
            shift = k * ctx.dilation
            if shift < length:
                masked_BTC = grad_BTC[:, shift:]
                if masks:
                    masked_BTC = torch.where(masks[k - 1][:, shift:], masked_BTC, 0)
                grad_x_BTC[:, : length - shift].addcmul_(masked_BTC, w_CK[:, num_taps - 1 - k])
                grad_w_CK[:, num_taps - 1 - k] = (masked_BTC * x_BTC[:, : length - shift]).sum((0, 1))
        grad_bias_C = grad_BTC.sum((0, 1)) if ctx.has_bias else None
        return grad_x_BTC, grad_w_CK, grad_bias_C, None, *(None for _ in masks)
