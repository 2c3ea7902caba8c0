"""Attention over packed documents by FlashAttention kernels: torch's own copy of them, or the flash_attn package.

Rows are concatenated and `cu_seqlens` has the start of each document; nothing of size T·T exists, and no score across
documents is computed. Both support fewer key/value heads than query heads.

Legend: B rows, T positions, H query heads, K key/value heads, D head width, X = B·T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.ops import packages
from trainer.ops.documents import Documents
from trainer.ops.setting import Setting

TORCH, PACKAGE = "torch.nn.attention.varlen:varlen_attn", "flash_attn:flash_attn_varlen_func"
MAX_HEAD_DIM = 256


def attention_varlen(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """See `attention_reference`; torch.nn.attention.varlen, held to FlashAttention also where torch prefers cuDNN."""
    kernel = packages.kernel(TORCH)
    # torch 2.11 accepts grouped heads implicitly; later versions need a flag.
    grouped = {"enable_gqa": True} if "enable_gqa" in kernel.parameters else {}
    q_XHD, k_XKD, v_XKD = (tensor.flatten(0, 1) for tensor in (q_BTHD, k_BTKD, v_BTKD))
    starts, length = documents.cu_seqlens, longest(q_BTHD)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y_XHD = kernel.function(q_XHD, k_XKD, v_XKD, starts, starts, length, length, window_size=(-1, 0), **grouped)
    return y_XHD.view_as(q_BTHD)


def attention_flash_attn(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """See `attention_reference`; `flash_attn_varlen_func` of the flash_attn package."""
    attend = packages.kernel(PACKAGE).function
    q_XHD, k_XKD, v_XKD = (tensor.flatten(0, 1) for tensor in (q_BTHD, k_BTKD, v_BTKD))
    starts, length = documents.cu_seqlens, longest(q_BTHD)
    return attend(q_XHD, k_XKD, v_XKD, starts, starts, length, length, causal=True).view_as(q_BTHD)


def longest(q_BTHD: Tensor) -> int:
    """An upper bound, the same for every batch; above 1, since at 1 the kernels rearrange heads for decoding."""
    return max(q_BTHD.shape[1], 2)


def varlen_unsupported(setting: Setting) -> str | None:
    return unfit(setting) or packages.kernel_problem(TORCH)


def flash_attn_unsupported(setting: Setting) -> str | None:
    return unfit(setting) or packages.kernel_problem(PACKAGE)


def unfit(setting: Setting) -> str | None:
    """The kernels' requirements on device, dtype and head width."""
    if (reason := setting.below(8, 0)) is not None:
        return reason
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bf16 and fp16, not {setting.variant}"
    attention = setting.model.attention if setting.model else None
    if attention and (attention.head_dim % 8 or attention.head_dim > MAX_HEAD_DIM):
        return f"takes head widths in multiples of 8 up to {MAX_HEAD_DIM}, the model has {attention.head_dim}"
    return None
