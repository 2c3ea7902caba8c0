"""Activation memory: bytes kept from forward to backward pass, by arithmetic for the portable backends. No torch.

It counts tensors that grow with the number of tokens; a test compares the sum with what autograd really keeps. Package
kernels keep less for attention and scan. The full logits never exist (trainer/ops/cross_entropy.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.kinds.base import FP32_BYTES, INDEX_BYTES, Kind, Widths
from trainer.modelspec import ModelSpec
from trainer.runtimespec import Policy

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


def activations(spec: ModelSpec, seq_len: int, policy: Policy = "none", precision: str = "bf16") -> Activations:
    """Activations of training on rows of `seq_len` tokens under a policy; `precision` is a name of the ladder."""
    widths = WIDTHS[precision]
    layers = [[spec.section(symbol, index) for symbol in layer] for index, layer in enumerate(spec.layers)]
    if spec.mtp:
        layers += [[spec.section(symbol) for symbol in spec.mtp.layer]] * spec.mtp.depth
    everything = [sum(_kept(section, spec, widths) for section in layer) for layer in layers]
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
    if any(section.attends for section in spec.used()):
        kept += seq_len * (1 + widths.product)  # the document mask, boolean and additive
    return Activations(kept + _outside_layers(spec, widths), again, lines)


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
