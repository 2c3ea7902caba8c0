"""Activation memory: bytes kept from forward to backward pass, by arithmetic for the portable backends. No torch.

It counts tensors that grow with the number of tokens; a test compares the sum with what autograd really keeps. Package
kernels keep less for attention and scan. The full logits never exist (trainer/ops/cross_entropy.py).

Whole layers are recomputed in regions (`regions`). A region keeps its input only, and all that its layers keep exists
again while its backward pass runs, when what later regions kept is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainer.kinds.base import FP32_BYTES, INDEX_BYTES, Kind, Widths
from trainer.modelspec import ModelSpec
from trainer.runtimespec import RecomputeSpec, Recomputing

WIDTHS = {"fp32": Widths(4, 4), "bf16": Widths(2, 2), "fp8": Widths(2, 2, keeps_copies=True), "fp16": Widths(4, 2)}


@dataclass(frozen=True)
class Activations:
    """Bytes per token of a micro-batch.

    Attributes:
        kept: from the forward to the backward pass.
        again: the largest amount recomputed at one time, in addition, in the backward pass.
        recomputed: what is recomputed, one line per kind of sublayer.
    """

    kept: int
    again: int
    recomputed: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.kept + self.again


def activations(spec: ModelSpec, seq_len: int, policy: Recomputing = "none", precision: str = "bf16") -> Activations:
    """Activations of training on rows of `seq_len` tokens under a policy; `precision` is a name of the ladder."""
    widths = WIDTHS[precision]
    layers = _sections(spec)
    everything = _by_layer(spec, widths)
    kept, again = sum(everything), 0
    lines: tuple[str, ...] = ()
    if policy == "selective":
        kept = sum(_kept_selective(section, spec, widths) for layer in layers for section in layer)
        again = max(_kept(s, spec, widths) - _kept_selective(s, spec, widths) for layer in layers for s in layer)
        lines = tuple(dict.fromkeys(f"{s.symbol}: {s.recomputed}" for layer in layers for s in layer))
    elif policy == "full":
        kept = len(layers) * spec.hidden * widths.stream
        again = max(everything)
        lines = ("every layer from its input, matrix products and choice of experts included",)
    elif policy != "none":
        again_in = regions(spec, policy)
        kept, again = _in_regions(everything, again_in, spec.hidden * widths.stream)
        lines = (_in_words(again_in, len(layers)),)
    if any(section.attends for section in spec.used()):
        kept += seq_len * (1 + widths.product)  # the document mask, boolean and additive
    return Activations(kept + _outside_layers(spec, widths), again, lines)


def regions(spec: ModelSpec, policy: Recomputing) -> list[tuple[int, int]]:
    """Ranges [first, last) of layers that are recomputed whole, each from its input; those of multi-token prediction
    count after the others.

    Under `sqrt` √n layers form a region (Chen et al. 2016, arXiv 1604.06174). The last region is not recomputed there,
    as its backward pass begins when its forward pass has ended. `budget_gib` must have become `layers`
    (trainer/arithmetic/budget.py).
    """
    trunk = len(spec.layers)
    count = trunk + (spec.mtp.depth if spec.mtp else 0)
    if policy == "full":
        return _alone(range(count))
    if policy == "sqrt":
        borders = [*range(0, trunk, max(1, round(trunk**0.5))), *range(trunk, count + 1)]
        return list(pairwise(borders))[:-1]
    if not isinstance(policy, RecomputeSpec):
        return []
    if policy.every:
        return _alone(range(0, count, policy.every))
    assert policy.layers, "a budget is resolved before"
    saved = _by_layer(spec, WIDTHS["bf16"])
    # Of equal ones the first: they are recomputed when the later ones have freed what they kept.
    return _alone(sorted(sorted(range(count), key=lambda layer: (-saved[layer], layer))[: policy.layers]))


def _alone(layers: Sequence[int]) -> list[tuple[int, int]]:
    return [(layer, layer + 1) for layer in layers]


def _in_regions(everything: list[int], again_in: list[tuple[int, int]], stream: int) -> tuple[int, int]:
    """`Activations.kept` and `again` of the layers.

    Args:
        everything: bytes that each layer keeps if it is not recomputed.
        stream: of the input of a region.
    """
    within = {layer: first for first, last in again_in for layer in range(first, last)}
    parts: dict[int, int] = {}  # what each region keeps while its backward pass runs; others are regions of one layer
    for layer, size in enumerate(everything):
        parts[within.get(layer, layer)] = parts.get(within.get(layer, layer), 0) + size
    kept = peak = 0
    for first, size in parts.items():
        peak = max(peak, kept + size + (stream if first in within else 0))
        kept += stream if first in within else size
    return kept, max(0, peak - kept)


def _in_words(again_in: list[tuple[int, int]], layers: int) -> str:
    names = [str(first) if last == first + 1 else f"{first}–{last - 1}" for first, last in again_in]
    return f"whole layers, each group from its input: {', '.join(names) or 'none'} of 0–{layers - 1}"


def _sections(spec: ModelSpec) -> list[list[Kind]]:
    """The sublayers of each layer, those of multi-token prediction included."""
    layers = [[spec.section(symbol, index) for symbol in layer] for index, layer in enumerate(spec.layers)]
    if spec.mtp:
        layers += [[spec.section(symbol) for symbol in spec.mtp.layer]] * spec.mtp.depth
    return layers


def _by_layer(spec: ModelSpec, widths: Widths) -> list[int]:
    """Bytes that each layer keeps under `none`."""
    return [sum(_kept(section, spec, widths) for section in layer) for layer in _sections(spec)]


def _kept(section: Kind, spec: ModelSpec, widths: Widths) -> int:
    """Of the norm in front its input, which is the residual stream, its scale, and its output; and what the mixer
    keeps."""
    norm = spec.hidden * (widths.stream + widths.product) + FP32_BYTES if section.pre_norm else 0
    return norm + section.kept(spec.hidden, widths)


def _kept_selective(section: Kind, spec: ModelSpec, widths: Widths) -> int:
    """The input of the norm (the residual stream), and the results of the first matrix products."""
    return spec.hidden * widths.stream + section.kept_selective(spec.hidden, widths)


def _outside_layers(spec: ModelSpec, widths: Widths) -> int:
    """Final norm, and the gradient that the cross-entropy stores; each depth of MTP also has two norms in front."""
    hidden = spec.hidden
    head = hidden * (widths.stream + widths.product) + FP32_BYTES
    depths = spec.mtp.depth if spec.mtp else 0
    before = hidden * (FP32_BYTES + 2 * widths.product) + 2 * FP32_BYTES  # of embeddings, and both side by side
    return (1 + depths) * head + depths * before + INDEX_BYTES
