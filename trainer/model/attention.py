"""Grouped-query attention (Ainslie et al. 2023), by default without position embedding: the Mamba layers encode the
order.

Legend: B rows, T positions, D hidden, H query heads, K key/value heads, W head width, I = H·W, J = K·W.
"""

from __future__ import annotations

from torch import Tensor

from trainer import mup
from trainer.kinds.attention import AttentionSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.norm import RMSNorm
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.rotary import rotate


class Attention(Mixer):
    def __init__(self, model: ModelSpec, spec: AttentionSpec, functions: Functions) -> None:
        super().__init__()
        self.spec, hidden = spec, model.hidden
        self.query_factor = mup.attention_factor(model)  # beside the usual 1/√W
        self.attend = functions["attention"]
        self.q_proj = Linear(hidden, spec.num_heads * spec.head_dim, bias=spec.bias)
        self.k_proj = Linear(hidden, spec.num_kv_heads * spec.head_dim, bias=spec.bias)
        self.v_proj = Linear(hidden, spec.num_kv_heads * spec.head_dim, bias=spec.bias)
        self.o_proj = Linear(spec.num_heads * spec.head_dim, hidden, bias=spec.bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, model.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, model.norm_eps)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def mix(self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, documents: Documents) -> Mixed:
        spec = self.spec
        q_BTHW = q_BTI.unflatten(-1, (spec.num_heads, -1))
        k_BTKW = k_BTJ.unflatten(-1, (spec.num_kv_heads, -1))
        v_BTKW = v_BTJ.unflatten(-1, (spec.num_kv_heads, -1))
        if spec.qk_norm:
            q_BTHW, k_BTKW = self.q_norm(q_BTHW), self.k_norm(k_BTKW)
        if self.query_factor != 1:
            q_BTHW = q_BTHW * self.query_factor
        if (rotation := spec.rotation) is not None:
            turns_BT1W = documents.turns_BT1W(rotation)
            q_BTHW, k_BTKW = rotate(q_BTHW, *turns_BT1W), rotate(k_BTKW, *turns_BT1W)
        return Mixed(self.o_proj(self.attend(q_BTHW, k_BTKW, v_BTKW, documents).flatten(2)))
