"""Bytes that a forward pass keeps for the backward pass, by arithmetic over the portable backends. Imports no torch.

Counted are tensors that grow with the number of tokens; a test holds the sum to what autograd really keeps. Kernels of
packages keep less for attention and scan. Logits never exist as a whole (trainer/ops/cross_entropy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainer.modelspec import ModelSpec
from trainer.spec import Policy

S = TypeVar("S")

WIDE, INDEX = 4, 8  # bytes of an fp32 and an int64 number

# By sublayer: what `selective` computes again.
RECOMPUTED = {
    "M": "norm, convolution, scan, gated norm",
    "E": "norm",
    "*": "norm",
    "-": "norm, squared ReLU",
    "N": "all of it",
}


@dataclass(frozen=True)
class Widths:
    """Bytes of one number: in the residual stream, and between matrix products. FP8 experts keep routed copies."""

    stream: int
    product: int
    keeps_copies: bool = False


WIDTHS = {"fp32": Widths(4, 4), "bf16": Widths(2, 2), "fp8": Widths(2, 2, keeps_copies=True), "fp16": Widths(4, 2)}


@dataclass(frozen=True)
class Activations:
    """Bytes for each token of a micro-batch.

    Attributes:
        kept: from the forward to the backward pass.
        again: the most that is computed again at one time and exists on top, in the backward pass.
        recomputed: what is computed again, one line for each kind of sublayer.
    """

    kept: int
    again: int
    recomputed: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.kept + self.again


def activations(spec: ModelSpec, seq_len: int, policy: Policy = "none", precision: str = "bf16") -> Activations:
    """What training on rows of `seq_len` tokens keeps under a policy; precision as the ladder names it."""
    widths = WIDTHS[precision]
    layers = [*spec.layers, *([spec.mtp.layer] * spec.mtp.depth if spec.mtp else [])]
    all_of = {symbol: _sublayer(spec, symbol, widths) for symbol in set("".join(layers))}
    part_of = {symbol: _sublayer_selective(spec, symbol, widths) for symbol in all_of}
    everything = [sum(all_of[symbol] for symbol in layer) for layer in layers]
    kept, again, lines = sum(everything), 0, ()
    used = "".join(dict.fromkeys("".join(layers)))
    if policy == "selective":
        kept = sum(part_of[symbol] for layer in layers for symbol in layer)
        again = max(all_of[symbol] - part_of[symbol] for symbol in all_of)
        lines = tuple(f"{symbol}: {RECOMPUTED[symbol]}" for symbol in used)
    elif policy == "full":
        kept = len(layers) * spec.hidden * widths.stream
        again = max(everything)
        lines = ("every layer from its input, matrix products and choice of experts included",)
    if "*" in used:
        kept += seq_len * (1 + widths.product)  # the mask of documents, as it is and as attention adds it
    return Activations(kept + _outside_layers(spec, widths), again, lines)


def _norm(spec: ModelSpec, widths: Widths) -> int:
    """Its input, which is the residual stream, its scale, and its output."""
    return spec.hidden * (widths.stream + widths.product) + WIDE


def _outside_layers(spec: ModelSpec, widths: Widths) -> int:
    """Final norm, and the gradient that the cross-entropy stores; each depth of MTP also has two norms in front."""
    hidden = spec.hidden
    head = hidden * (widths.stream + widths.product) + WIDE
    depths = spec.mtp.depth if spec.mtp else 0
    before = hidden * (WIDE + 2 * widths.product) + 2 * WIDE  # of embeddings, and both side by side
    return (1 + depths) * head + depths * before + INDEX


def _sublayer(spec: ModelSpec, symbol: str, widths: Widths) -> int:
    if symbol == "N":
        return _engram(spec, widths)
    mixer: dict[str, Callable[[ModelSpec, Widths], int]] = {"M": _mamba, "E": _moe, "*": _attention, "-": _mlp}
    return _norm(spec, widths) + mixer[symbol](spec, widths)


def _sublayer_selective(spec: ModelSpec, symbol: str, widths: Widths) -> int:
    """The stream in front of the norm, and the results of the first matrix products."""
    stream = spec.hidden * widths.stream
    if symbol == "M":
        mamba = _section(spec.mamba)
        return stream + (mamba.d_inner + mamba.conv_dim + mamba.num_heads) * widths.product
    if symbol == "E":
        return stream + spec.hidden * widths.product + _moe(spec, widths)
    if symbol == "*":
        return stream + _attention(spec, widths)
    if symbol == "-":
        return stream + _section(spec.mlp).width * widths.product
    return stream


def _mlp(spec: ModelSpec, widths: Widths) -> int:
    return 2 * _section(spec.mlp).width * widths.product  # after ReLU and after squaring


def _attention(spec: ModelSpec, widths: Widths) -> int:
    """Queries, keys, values, the result, and the logarithm of each query's sum."""
    attention = _section(spec.attention)
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return heads * attention.head_dim * widths.product + attention.num_heads * WIDE


def _moe(spec: ModelSpec, widths: Widths) -> int:
    """Scores, choices and weights, two orders of the copies, and their hidden layer before its activation."""
    moe = _section(spec.moe)
    by_copy = 3 * INDEX + 2 * WIDE + moe.expert_width * widths.product
    if widths.keeps_copies:
        by_copy += (spec.hidden + 2 * moe.expert_width) * widths.product
    return moe.num_experts * WIDE + moe.top_k * by_copy + 2 * WIDE + 2 * moe.shared_width * widths.product


def _mamba(spec: ModelSpec, widths: Widths) -> int:
    mamba = _section(spec.mamba)
    inner, heads, chunk = mamba.d_inner, mamba.num_heads, mamba.chunk_size
    narrow = widths.product < WIDE
    projected = (inner + mamba.conv_dim) * widths.product
    convolved = 2 * mamba.conv_dim * widths.product  # before and after SiLU
    gated_norm = 2 * inner * widths.product + mamba.num_groups * WIDE
    time_steps = heads * (6 * WIDE + 8)
    within_chunk = 2 * heads * chunk * WIDE
    wide_copies = (2 * inner + 2 * mamba.num_groups * mamba.d_state) * WIDE if narrow else 0
    weighted = (inner * WIDE) * 3 + (inner * widths.product if narrow else 0)
    states = 2 * inner * mamba.d_state * WIDE // chunk
    return projected + convolved + gated_norm + time_steps + within_chunk + wide_copies + weighted + states


def _engram(spec: ModelSpec, widths: Widths) -> int:
    """The largest one: memory as it is found, keys and values, the four norms, gate and convolution."""
    hidden = spec.hidden
    narrow = widths.product < WIDE

    def one(memory: int, tables: int) -> int:
        found = memory * (2 * widths.product if narrow else WIDE) + tables * INDEX
        compared = 2 * hidden * WIDE  # by the gate, in fp32
        return found + compared + hidden * (widths.stream + 5 * widths.product) + 8 * WIDE

    return max(one(e.d_mem, (e.max_order - 1) * e.num_heads) for e in spec.engram)


def _section(section: S | None) -> S:
    assert section is not None, "ModelSpec guarantees the section of every sublayer that is used"
    return section
