"""Grouped-query attention (Ainslie et al. 2023), by default without positions: the Mamba layers know the order.

Legend: B rows, T positions, D hidden, H query heads, K key/value heads, W head width, I = H·W, J = K·W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import mup
from trainer.kinds.attention import AttentionSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.modelspec import ModelSpec
from trainer.ops import Documents


class Attention(Mixer):
    def __init__(self, model: ModelSpec, spec: AttentionSpec, functions: Functions) -> None:
        super().__init__()
        self.spec, hidden = spec, model.hidden
        self.query_factor = mup.attention_factor(model)  # beside the usual 1/√W
        self.attend = functions["attention"]
        self.q_proj = Linear(hidden, spec.num_heads * spec.head_dim)
        self.k_proj = Linear(hidden, spec.num_kv_heads * spec.head_dim)
        self.v_proj = Linear(hidden, spec.num_kv_heads * spec.head_dim)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, hidden)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def mix(self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, documents: Documents) -> Mixed:
        if self.query_factor != 1:
            q_BTI = q_BTI * self.query_factor
        q_BTHW = q_BTI.unflatten(-1, (self.spec.num_heads, -1))
        k_BTKW = k_BTJ.unflatten(-1, (self.spec.num_kv_heads, -1))
        v_BTKW = v_BTJ.unflatten(-1, (self.spec.num_kv_heads, -1))
        if self.spec.rope_theta is not None:
            q_BTHW = rotate(q_BTHW, documents.position_BT, self.spec.rope_theta)
            k_BTKW = rotate(k_BTKW, documents.position_BT, self.spec.rope_theta)
        return Mixed(self.o_proj(self.attend(q_BTHW, k_BTKW, v_BTKW, documents).flatten(2)))


def rotate(x_BTHW: Tensor, position_BT: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021), half-split pairing, in fp32.

    Positions begin afresh in each document. Only their differences enter the scores, so the result is the same as
    with positions in the row; but the angles are rounded as if the document stood alone.
    """
    width = x_BTHW.shape[3]
    rate_W = 1 / theta ** (torch.arange(0, width, 2, device=x_BTHW.device, dtype=torch.float32) / width)
    angle_BT1W = (position_BT[..., None].float() * rate_W)[:, :, None]
    cos_BT1W, sin_BT1W = angle_BT1W.cos(), angle_BT1W.sin()
    first, second = x_BTHW.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_BT1W - second * sin_BT1W, second * cos_BT1W + first * sin_BT1W], dim=-1)
    return turned.to(x_BTHW.dtype)
