"""Parameters and floating-point operations of a model, by arithmetic alone. Imports no torch.

`parameters` lists every parameter that `trainer.model.hybrid` builds, with its name and shape (a test holds the two
together). Three ways to count what is active for one token are in use, and they differ by more than a tenth:

    A1  all but the input embedding, the Engram tables and the experts not chosen: what multiplies a token. NVIDIA
        counts its Nemotron models so, and so does this project wherever it says "active".
    A2  A1 + input embedding ("including embeddings").
    A3  A1 - LM head (non-embedding; the Engram paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.model.ngrams import table_primes
from trainer.modelspec import SUBLAYERS, ModelSpec

TRAINING_PASSES = 3  # forward 1, backward 2: gradients of the inputs and of the weights


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor.

    Attributes:
        active: how many of its elements take part in one token under A1.
        multiplies: whether those act as a matrix product (two operations for each element and token).
    """

    name: str
    shape: tuple[int, ...]
    active: int
    multiplies: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parameters(spec: ModelSpec) -> list[Parameter]:
    """All parameters, in the order of the model."""
    found = [Parameter("embedding.weight", (spec.vocab_size, spec.hidden), active=0, multiplies=False)]
    for index, layer in enumerate(spec.layers):
        for place, symbol in enumerate(layer):
            found += sublayer_parameters(spec, index, place, symbol)
    found.append(_vector("final_norm.weight", spec.hidden))
    found.append(_matrix("head.weight", spec.vocab_size, spec.hidden))
    for number in range(spec.mtp.depth if spec.mtp else 0):
        found += mtp_parameters(spec, number)
    return found


def sublayer_parameters(spec: ModelSpec, index: int, place: int, symbol: str) -> list[Parameter]:
    """Norm and mixer of sublayer `place` of layer `index`."""
    if symbol == "N":
        return list(_engram(spec, index, f"layers.{index}.{place}.mixer."))
    return _normed(spec, symbol, f"layers.{index}.{place}.")


def mtp_parameters(spec: ModelSpec, number: int) -> list[Parameter]:
    """Module `number` of multi-token prediction: its norms, its projection and its layer; the head is the model's."""
    assert spec.mtp is not None
    at = f"mtp.{number}."
    found = [_vector(f"{at}{name}.weight", spec.hidden) for name in ("hidden_norm", "token_norm", "head_norm")]
    found.append(_matrix(at + "proj.weight", spec.hidden, 2 * spec.hidden))
    for place, symbol in enumerate(spec.mtp.layer):
        found += _normed(spec, symbol, f"{at}layer.{place}.")
    return found


def _normed(spec: ModelSpec, symbol: str, prefix: str) -> list[Parameter]:
    own = {"M": _mamba, "E": _moe, "*": _attention, "-": _mlp}
    return [_vector(prefix + "norm.weight", spec.hidden), *own[symbol](spec, prefix + "mixer.")]


def _matrix(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, math.prod(shape), multiplies=True)


def _vector(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, math.prod(shape), multiplies=False)


def _mamba(spec: ModelSpec, at: str) -> Iterator[Parameter]:
    mamba = spec.mamba
    assert mamba is not None
    for name in ("A_log", "D", "dt_bias"):
        yield _vector(at + name, mamba.num_heads)
    yield _matrix(at + "zxbc_proj.weight", mamba.d_inner + mamba.conv_dim, spec.hidden)
    yield _matrix(at + "dt_proj.weight", mamba.num_heads, spec.hidden)
    yield _vector(at + "conv.weight", mamba.conv_dim, mamba.conv_kernel)
    yield _vector(at + "conv.bias", mamba.conv_dim)
    yield _vector(at + "norm.weight", mamba.d_inner)
    yield _matrix(at + "out_proj.weight", spec.hidden, mamba.d_inner)


def _moe(spec: ModelSpec, at: str) -> Iterator[Parameter]:
    moe = spec.moe
    assert moe is not None
    chosen = moe.top_k * moe.expert_width * spec.hidden
    yield Parameter(at + "up_EFD", (moe.num_experts, moe.expert_width, spec.hidden), chosen, multiplies=True)
    yield Parameter(at + "down_EDF", (moe.num_experts, spec.hidden, moe.expert_width), chosen, multiplies=True)
    yield _matrix(at + "router.weight", moe.num_experts, spec.hidden)
    if moe.shared_width:
        yield _matrix(at + "shared_up.weight", moe.shared_width, spec.hidden)
        yield _matrix(at + "shared_down.weight", spec.hidden, moe.shared_width)


def _attention(spec: ModelSpec, at: str) -> Iterator[Parameter]:
    attention = spec.attention
    assert attention is not None
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    yield _matrix(at + "q_proj.weight", query, spec.hidden)
    yield _matrix(at + "k_proj.weight", key, spec.hidden)
    yield _matrix(at + "v_proj.weight", key, spec.hidden)
    yield _matrix(at + "o_proj.weight", spec.hidden, query)


def _mlp(spec: ModelSpec, at: str) -> Iterator[Parameter]:
    assert spec.mlp is not None
    yield _matrix(at + "up.weight", spec.mlp.width, spec.hidden)
    yield _matrix(at + "down.weight", spec.hidden, spec.mlp.width)


def _engram(spec: ModelSpec, index: int, at: str) -> Iterator[Parameter]:
    place, engram = next((i, e) for i, e in enumerate(spec.engram) if e.layer == index)
    rows = sum(table_primes(spec.engram)[place])
    shape = (rows, engram.width_per_order // engram.num_heads)
    yield Parameter(at + "tables.weight", shape, active=0, multiplies=False)
    yield _matrix(at + "key_proj.weight", spec.hidden, engram.d_mem)
    yield _matrix(at + "value_proj.weight", spec.hidden, engram.d_mem)
    for name in ("key_norm", "query_norm", "conv_norm"):
        yield _vector(f"{at}{name}.weight", spec.hidden)
    yield _vector(at + "conv.weight", spec.hidden, engram.conv_kernel)


def core_flops_per_token(spec: ModelSpec, symbol: str, seq_len: int) -> int:
    """Training operations of a mixer outside its weights, for one token of a row that is one document.

    Attention: q·kᵀ and the weighted sum over the (seq_len)/2 positions that a causal query sees on average. SSD, by
    the chunked algorithm with Q positions in a chunk: C·Bᵀ for each group; masked product, state in and state out for
    each head.
    """
    if symbol == "*":
        assert spec.attention is not None
        return TRAINING_PASSES * 2 * seq_len * spec.attention.num_heads * spec.attention.head_dim
    if symbol == "M":
        assert spec.mamba is not None
        chunk, state, width = spec.mamba.chunk_size, spec.mamba.d_state, spec.mamba.head_dim
        by_head = spec.mamba.num_heads * (2 * chunk * width + 4 * state * width)
        return TRAINING_PASSES * (spec.mamba.num_groups * 2 * chunk * state + by_head)
    assert symbol in SUBLAYERS, symbol
    return 0


def matrix_flops_per_token(found: list[Parameter]) -> int:
    """Training operations of matrix products with these weights: 2 · 3 for each active element."""
    return TRAINING_PASSES * 2 * sum(parameter.active for parameter in found if parameter.multiplies)


def mtp_core_flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """What a module of multi-token prediction computes beside its own weights: its mixers' cores and the head again."""
    assert spec.mtp is not None
    head = matrix_flops_per_token([_matrix("head.weight", spec.vocab_size, spec.hidden)])
    return head + sum(core_flops_per_token(spec, symbol, seq_len) for symbol in spec.mtp.layer)


def flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """Operations to train on one token at `seq_len`: matrix products, attention core and scan, nothing recomputed."""
    cores = sum(core_flops_per_token(spec, symbol, seq_len) for layer in spec.layers for symbol in layer)
    if spec.mtp:
        cores += spec.mtp.depth * mtp_core_flops_per_token(spec, seq_len)
    return matrix_flops_per_token(parameters(spec)) + cores
