"""Causal grouped-query attention that never crosses a document boundary.

Legend: B rows, T positions, H query heads, K key/value heads (H is a multiple of K), D head width, L positions of a
document.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.documents import Documents
from trainer.ops.wide import computed_in


def attention_reference(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """softmax(q·kᵀ/√D) v over the earlier positions, in fp32, one document after the other. Returns [B, T, H, D]."""
    heads_per_group = q_BTHD.shape[2] // k_BTKD.shape[2]
    rows = (q_BTHD, k_BTKD.repeat_interleave(heads_per_group, dim=2), v_BTKD.repeat_interleave(heads_per_group, dim=2))
    lengths = documents.cu_seqlens.diff().tolist()
    parts = []
    for q_LHD, k_LHD, v_LHD in zip(*(tensor.flatten(0, 1).float().split(lengths) for tensor in rows), strict=True):
        scores_HLL = torch.einsum("thd,shd->hts", q_LHD, k_LHD) / math.sqrt(q_BTHD.shape[-1])
        seen_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).tril()
        parts.append(torch.einsum("hts,shd->thd", scores_HLL.masked_fill(~seen_LL, -math.inf).softmax(-1), v_LHD))
    return torch.cat(parts).view_as(q_BTHD).to(q_BTHD.dtype)


def attention_sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """The same through torch's fused attention; the document mask is a term of the scores.

    On a GPU only the memory-efficient kernel accepts a mask, and with `enable_gqa` torch may fall back to the kernel
    that keeps all T·T scores; so the key/value heads are repeated instead. Which kernel torch then selects has not been
    measured on a GPU.
    """
    heads_per_group = q_BTHD.shape[2] // k_BTKD.shape[2]
    if q_BTHD.is_cuda and heads_per_group > 1:
        k_BTKD, v_BTKD = (kv_BTKD.repeat_interleave(heads_per_group, dim=2) for kv_BTKD in (k_BTKD, v_BTKD))
        heads_per_group = 1
    whole_rows, dtype = documents.whole_rows, q_BTHD.dtype
    wide = computed_in(dtype, q_BTHD.device)
    q_BTHD, k_BTKD, v_BTKD = (tensor.to(wide) for tensor in (q_BTHD, k_BTKD, v_BTKD))
    with torch.autocast(q_BTHD.device.type, enabled=False):  # which would narrow them again
        y_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTKD.transpose(1, 2),
            v_BTKD.transpose(1, 2),
            attn_mask=None if whole_rows else documents.added_mask_B1TT(wide),
            is_causal=whole_rows,
            enable_gqa=heads_per_group > 1,
        )
    return y_BHTD.transpose(1, 2).to(dtype)
