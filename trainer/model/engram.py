"""Engram: conditional memory by hashed n-grams (arXiv 2601.07372).

The last 2..N tokens are hashed into tables of learned rows; the rows give keys and values, and the hidden state
controls by a gate how much of the value to add. The indices are a function of the tokens alone, equal to the authors'
reference code:

    idx[n, k] = (x_t·m_0 ⊕ x_{t-1}·m_1 ⊕ … ⊕ x_{t-n+1}·m_{n-1}) mod p[n, k]      n = 2..N, k = 1..K, all in int64

with odd multipliers m drawn for each layer and a different prime p ≥ `rows_per_head` for each table. `x` are token
classes: tokens whose text differs only in case, accents or spaces share one (`token_classes`). Differences from that
code: n-grams stop at the start of their document (the class of token 0 stands in for what came before), so packing
does not change them; projections have no bias; the convolution starts at zero, as in the paper's training recipe.

Legend: B rows, T positions, D hidden, N orders, K heads (tables for each order), W row width, J = (N-1)·K tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import mup
from trainer.kinds.engram import EngramSpec
from trainer.kinds.ngrams import multipliers
from trainer.model.linear import Linear
from trainer.model.mamba2 import CausalConv
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.norm import RMSNorm
from trainer.model.ready import Ready, normed
from trainer.model.step import State, Step, convolved
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.engram import Hash, hashed, rows


class NgramHash(nn.Module):
    """The row in each table for each position. Its constants are buffers, so that a checkpoint contains its hash."""

    class_V: Tensor
    multiplier_N: Tensor
    prime_J: Tensor
    offset_J: Tensor

    def __init__(self, spec: EngramSpec, vocab_size: int, primes: list[int]) -> None:
        super().__init__()
        self.spec = spec
        self.primes = primes
        self.register_buffer("class_V", torch.empty(vocab_size, dtype=torch.int64))
        self.register_buffer("multiplier_N", torch.empty(spec.max_order, dtype=torch.int64))
        self.register_buffer("prime_J", torch.empty(len(primes), dtype=torch.int64))
        self.register_buffer("offset_J", torch.empty(len(primes), dtype=torch.int64))

    def set_constants(self, classes: list[int] | None) -> None:
        """Fill the buffers; `classes` is the compression table, None for one class per token."""
        vocab_size = self.class_V.numel()
        table = list(range(vocab_size)) if classes is None else classes + [0] * (vocab_size - len(classes))
        numbers = multipliers(self.spec.layer, self.spec.max_order, max(table) + 1)
        offsets = np.cumsum([0, *self.primes[:-1]])
        for buffer, values in (
            (self.class_V, table),
            (self.multiplier_N, numbers),
            (self.prime_J, self.primes),
            (self.offset_J, offsets.tolist()),
        ):
            buffer.copy_(torch.tensor(values, dtype=torch.int64))

    @property
    def constants(self) -> Hash:
        return Hash(self.class_V, self.multiplier_N, self.prime_J, self.offset_J)

    def forward(self, ids_BT: Tensor, documents: Documents) -> Tensor:
        """[B, T, J] int64 rows in the joint table; columns go order by order, within an order head by head."""
        return hashed(ids_BT, documents, self.constants)

    def extend(self, ids_BT: Tensor, step: Step, state: State) -> Tensor:
        """The same at new positions. Zeros before the first one are PAD_TOKEN."""
        before, new = self.spec.max_order - 1, step.new
        class_BS = self.class_V[step.joined(state["ids"], ids_BT)]

        def earlier(back: int) -> Tensor:
            return class_BS[:, before - back : before - back + new]

        return rows(class_BS[:, before:], earlier, self.constants)


class Tables(nn.Embedding):
    """All tables, one after the other. FSDP2 gathers the rows of a module when it is called, and only then."""

    def forward(self, index: Tensor, look_up: Callable[..., Tensor] | None = None, *hashing: Any) -> Tensor:
        """The rows that `index` names; what `look_up` finds for token ids, if it is given (`trainer.ops.engram`)."""
        return super().forward(index) if look_up is None else look_up(index, *hashing, self.weight)


class Engram(Mixer):
    """Gathers, gates and smooths the memory: u = σ(gate(h, key))·value, y = u + SiLU(conv(norm(u)))."""

    def __init__(self, model: ModelSpec, spec: EngramSpec, functions: Functions) -> None:
        super().__init__()
        self.spec, hidden, primes = spec, model.hidden, spec.primes(model)
        self.convolve, self.look_up = functions["conv"], functions["engram"]
        self.gate_factor = mup.gate_factor(model)
        self.hash = NgramHash(spec, model.vocab_size, primes)
        rows_JW = torch.empty(sum(primes), spec.width_per_order // spec.num_heads)
        self.tables = Tables.from_pretrained(rows_JW, freeze=False)
        self.key_proj = Linear(spec.d_mem, hidden)
        self.value_proj = Linear(spec.d_mem, hidden)
        gate_eps = torch.finfo(torch.float32).eps
        self.key_norm = RMSNorm(hidden, gate_eps)
        self.query_norm = RMSNorm(hidden, gate_eps)
        self.conv_norm = RMSNorm(hidden, model.norm_eps)
        self.conv = CausalConv(hidden, spec.conv_kernel, bias=False)

    def forward(self, x_BTD: Tensor, norm: Callable[[Tensor], Tensor], ids_BT: Tensor, documents: Documents) -> Mixed:
        """All of it is one region; `norm` is not called, as the gate has norms of its own."""
        return Mixed(self.region("selective", lambda x_BTD: self.recall(x_BTD, ids_BT, documents), x_BTD))

    def reset_buffers(self, token_classes: list[int] | None) -> None:
        self.hash.set_constants(token_classes if self.spec.compress_tokens else None)

    def recall(self, h_BTD: Tensor, ids_BT: Tensor, documents: Documents) -> Tensor:
        """The memory's contribution to the hidden state."""
        u_BTD = self._gated(h_BTD, self._memory(ids_BT, documents))
        smooth_BTD = self.convolve(self.conv_norm(u_BTD), self.conv.weight, None, documents, self.spec.max_order)
        return u_BTD + F.silu(smooth_BTD)

    def ready(self, norm: nn.Module) -> Ready:
        conv_norm, w_KC, orders = normed(self.conv_norm), self.conv.weight.T.contiguous(), self.spec.max_order

        def extend(x_BTD: Tensor, step: Step, state: State) -> Tensor:
            u_BTD = self._gated(x_BTD, self.tables(self.hash.extend(step.ids_BT, step, state)).flatten(2))
            normed_BSD = step.joined(state["conv"], conv_norm(u_BTD))
            return u_BTD + F.silu(convolved(normed_BSD, w_KC, None, step.new, orders))

        return extend

    def _memory(self, ids_BT: Tensor, documents: Documents) -> Tensor:
        """What the rows of each token hold, [B, T, M]."""
        if isinstance(self.tables, Tables):
            return self.tables(ids_BT, self.look_up, documents, self.hash.constants)
        return self.tables(self.hash(ids_BT, documents)).flatten(2)  # quantised ones

    def _gated(self, h_BTD: Tensor, memory_BTM: Tensor) -> Tensor:
        """The value of what the rows hold, times the gate."""
        key_BTD, value_BTD = self.key_proj(memory_BTM), self.value_proj(memory_BTM)
        gate_BT1 = memory_gate(self.key_norm(key_BTD), self.query_norm(h_BTD), self.gate_factor)
        return gate_BT1.to(value_BTD.dtype) * value_BTD


def memory_gate(key_BTD: Tensor, query_BTD: Tensor, factor: float = 1.0) -> Tensor:
    """σ(sign(g)·√|g|) with g = factor·key·query/√D, [B, T, 1] fp32. |g| is kept ≥ 1e-6: a finite slope of the root."""
    g_BT1 = (key_BTD.float() * query_BTD.float()).sum(-1, keepdim=True) * (factor / math.sqrt(key_BTD.shape[-1]))
    return torch.sigmoid(g_BT1.sign() * g_BT1.abs().clamp(min=1e-6).sqrt())
