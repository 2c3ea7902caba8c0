"""Causal grouped-query attention that never crosses a document boundary.

Legend: B rows, T positions, H query heads, K key/value heads (H is a multiple of K), D head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.documents import Documents


def attention_reference(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """softmax(q·kᵀ/√D) v over the earlier positions of the same document, in fp32. Returns [B, T, H, D]."""
    heads_per_group = q_BTHD.shape[2] // k_BTKD.shape[2]
    k_BTHD = k_BTKD.repeat_interleave(heads_per_group, dim=2).float()
    v_BTHD = v_BTKD.repeat_interleave(heads_per_group, dim=2).float()
    scores_BHTT = torch.einsum("bthd,bshd->bhts", q_BTHD.float(), k_BTHD) / math.sqrt(q_BTHD.shape[-1])
    scores_BHTT = scores_BHTT.masked_fill(~documents.causal_mask_BTT[:, None], -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores_BHTT.softmax(-1), v_BTHD).to(q_BTHD.dtype)


def attention_sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """The same through torch's fused attention; the document mask is a boolean [B, 1, T, T].

    On a GPU only the memory-efficient kernel takes a mask, and with `enable_gqa` torch may fall back to the one that
    holds all T·T scores; so there the key/value heads are repeated instead. Which kernel torch then takes has not been
    measured on a GPU.
    """
    heads_per_group = q_BTHD.shape[2] // k_BTKD.shape[2]
    if q_BTHD.is_cuda and heads_per_group > 1:
        k_BTKD, v_BTKD = (kv_BTKD.repeat_interleave(heads_per_group, dim=2) for kv_BTKD in (k_BTKD, v_BTKD))
        heads_per_group = 1
    y_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=documents.causal_mask_BTT[:, None],
        enable_gqa=heads_per_group > 1,
    )
    return y_BHTD.transpose(1, 2)
