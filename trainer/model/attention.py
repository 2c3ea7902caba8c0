"""Grouped-query attention (Ainslie et al. 2023), by default without position embedding: the Mamba layers encode the
order.

Legend: B rows, T positions, S positions so far, D hidden, H query heads, K key/value heads, R = H/K query heads of a
key head, W head width, I = H·W, J = K·W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import mup
from trainer.kinds.attention import AttentionSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.norm import RMSNorm
from trainer.model.ready import Ready, linear, normed
from trainer.model.step import State, Step
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.rotary import rotate
from trainer.ops.wide import computed_in

FEW = 16  # new positions up to which the query heads of a key head are treated as positions of one head


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
        rotation = self.spec.rotation
        turns_BT1W = None if rotation is None else documents.turns_BT1W(rotation)
        q_BTHW, k_BTKW, v_BTKW = self._heads(q_BTI, k_BTJ, v_BTJ, turns_BT1W)
        return Mixed(self.o_proj(self.attend(q_BTHW, k_BTKW, v_BTKW, documents).flatten(2)))

    def _heads(
        self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, turns_BT1W: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normalised and turned as the spec says."""
        spec = self.spec
        q_BTHW = q_BTI.unflatten(-1, (spec.num_heads, -1))
        k_BTKW = k_BTJ.unflatten(-1, (spec.num_kv_heads, -1))
        v_BTKW = v_BTJ.unflatten(-1, (spec.num_kv_heads, -1))
        if spec.qk_norm:
            q_BTHW, k_BTKW = self.q_norm(q_BTHW), self.k_norm(k_BTKW)
        if self.query_factor != 1:
            q_BTHW = q_BTHW * self.query_factor
        if turns_BT1W is not None:
            q_BTHW, k_BTKW = rotate(q_BTHW, *turns_BT1W), rotate(k_BTKW, *turns_BT1W)
        return q_BTHW, k_BTKW, v_BTKW

    def ready(self, norm: nn.Module) -> Ready:
        norm_D, turned = normed(norm), self.spec.rotation is not None
        query, key, value, out = (linear(m) for m in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))

        def extend(x_BTD: Tensor, step: Step, state: State) -> Tensor:
            x_BTD = norm_D(x_BTD)
            turns_BT1W = step.turns_BT1W if turned else None
            q_BTHW, k_BTKW, v_BTKW = self._heads(query(x_BTD), key(x_BTD), value(x_BTD), turns_BT1W)
            k_BKSW = _appended(state["k"], k_BTKW, step)
            v_BKSW = _appended(state["v"], v_BTKW, step)
            return out(attend_to_all(q_BTHW, k_BKSW, v_BKSW, step).flatten(2))

        return extend


def _appended(cache_BKSW: Tensor, new_BTKW: Tensor, step: Step) -> Tensor:
    """Write the new positions behind the earlier ones of each row; returns all up to the longest row's end.

    Those that do not stay are written too. They lie behind what the next step sees and are overwritten by it.
    """
    if step.uniform is not None:
        cache_BKSW[:, :, step.uniform : step.end] = new_BTKW.transpose(1, 2)
    else:
        row_B1 = torch.arange(new_BTKW.shape[0], device=new_BTKW.device)[:, None]
        cache_BKSW[row_B1, :, step.at_BT] = new_BTKW.to(cache_BKSW.dtype)
    return cache_BKSW[:, :, : step.end]


def attend_to_all(q_BTHW: Tensor, k_BKSW: Tensor, v_BKSW: Tensor, step: Step) -> Tensor:
    """Attention of the new positions to all that they may see, [B, T, H, W] in the dtype of q.

    For few positions the R query heads of a key head are R more positions of it: keys and values are read once, while
    torch's `enable_gqa` would copy them R times on a CPU.
    """
    batch, new, heads, width = q_BTHW.shape
    kv_heads, dtype = k_BKSW.shape[1], q_BTHW.dtype
    wide = computed_in(k_BKSW.dtype, q_BTHW.device)
    q_BHTW, k_BKSW, v_BKSW = q_BTHW.transpose(1, 2).to(wide), k_BKSW.to(wide), v_BKSW.to(wide)
    seen_B1TS, per_key = step.seen_B1TS, heads // kv_heads
    if new > FEW:
        if per_key > 1:
            k_BKSW, v_BKSW = (kv_BKSW.repeat_interleave(per_key, dim=1) for kv_BKSW in (k_BKSW, v_BKSW))
        first = step.uniform == 0
        y_BHTW = F.scaled_dot_product_attention(
            q_BHTW, k_BKSW, v_BKSW, attn_mask=None if first else seen_B1TS, is_causal=first
        )
    else:
        q_BKRW = q_BHTW.reshape(batch, kv_heads, per_key * new, width)
        seen_B1RS = seen_B1TS if seen_B1TS is None or per_key == 1 else seen_B1TS.repeat(1, 1, per_key, 1)
        y_BKRW = F.scaled_dot_product_attention(q_BKRW, k_BKSW, v_BKSW, attn_mask=seen_B1RS)
        y_BHTW = y_BKRW.reshape(batch, heads, new, width)
    return y_BHTW.transpose(1, 2).to(dtype)
