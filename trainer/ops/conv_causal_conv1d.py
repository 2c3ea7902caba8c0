"""Causal convolution by the CUDA kernels of the causal_conv1d package.

With document ids the kernels want x as [B, C, T] with channels last in memory: C and the strides of B and T multiples
of 8, and 2 to 4 taps. They do not support dilation; a convolution with dilation d is d plain ones over every d-th
position.

Legend as in `trainer.ops.conv`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops import packages
from trainer.ops.documents import Documents
from trainer.ops.setting import Setting

KERNEL = "causal_conv1d:causal_conv1d_fn"


def conv_causal_conv1d(
    x_BTC: Tensor, w_CK: Tensor, bias_C: Tensor | None, documents: Documents, dilation: int = 1
) -> Tensor:
    """See `conv_reference`. Weights stay in their own dtype, so their gradients are summed in it."""
    kernel = packages.kernel(KERNEL).function
    seq_idx_BT = documents.seq_idx_BT.to(torch.int32)
    bias_C = None if bias_C is None else bias_C.to(w_CK.dtype)
    if dilation > 1:
        x_BTC, seq_idx_BT, length = _split(x_BTC, dilation), _split(seq_idx_BT, dilation), x_BTC.shape[1]
    y_BTC = kernel(_aligned(x_BTC).transpose(1, 2), w_CK, bias_C, seq_idx=seq_idx_BT.contiguous()).transpose(1, 2)
    return _join(y_BTC, dilation, length) if dilation > 1 else y_BTC


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run, for the widths and taps of the model."""
    if setting.device.type != "cuda":
        return "needs a CUDA device"
    if setting.model is not None and (reason := _unfit(setting)) is not None:
        return reason
    return packages.kernel_problem(KERNEL)


def _unfit(setting: Setting) -> str | None:
    model = setting.model
    assert model is not None
    found = [convolution for section in model.used() for convolution in section.convolutions(model.hidden)]
    widths = list(dict.fromkeys(width for convolution in found for width in convolution.aligned))
    if any(not 2 <= convolution.taps <= 4 for convolution in found):
        return f"takes 2 to 4 taps, the model has {max(convolution.taps for convolution in found)}"
    if any(width % 8 for width in widths):  # the kernel reads 16 bytes at a time
        return f"takes channels in multiples of 8, the model has {widths}"
    return None


def _aligned(x_BTC: Tensor) -> Tensor:
    """x itself if its memory layout suits the kernel (a slice of a projection usually does), else a copy."""
    batch_stride, time_stride, channel_stride = x_BTC.stride()
    fits = channel_stride == 1 and time_stride % 8 == 0 and batch_stride % 8 == 0
    return x_BTC if fits else x_BTC.contiguous()


def _split(tensor_BT: Tensor, dilation: int) -> Tensor:
    """[B, T, …] → [B·dilation, ⌈T / dilation⌉, …]: row r of a group holds positions r, r + dilation, …"""
    length = tensor_BT.shape[1]
    padding = (0, 0) * (tensor_BT.dim() - 2) + (0, -length % dilation)
    return F.pad(tensor_BT, padding).unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)


def _join(tensor_BT: Tensor, dilation: int, length: int) -> Tensor:
    """Inverse of `_split`."""
    return tensor_BT.unflatten(0, (-1, dilation)).transpose(1, 2).flatten(1, 2)[:, :length]
