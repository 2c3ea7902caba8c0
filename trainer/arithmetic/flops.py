"""Floating-point operations of a model, by arithmetic alone. Imports no torch.

Three ways to count the active parameters of a token are in use, and they differ by more than a tenth:

    A1  all but the input embedding, the Engram tables and the unselected experts: what multiplies a token. NVIDIA
        counts its Nemotron models this way, and this project uses it for "active".
    A2  A1 + input embedding ("including embeddings").
    A3  A1 - LM head (non-embedding; the Engram paper).
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.kinds.base import Parameter
from trainer.modelspec import ModelSpec
from trainer.parameters import head, parameters

TRAINING_PASSES = 3  # forward 1, backward 2: gradients of the inputs and of the weights
FROZEN_PASSES = 2  # no gradient of the weights


def core_flops_per_token(spec: ModelSpec, symbol: str, seq_len: int, layer: int | None = None) -> int:
    """Training operations of a mixer besides its weights, for one token of a row with one document."""
    return TRAINING_PASSES * spec.section(symbol, layer).core_flops(seq_len)


def matrix_flops_per_token(found: Iterable[Parameter]) -> int:
    """Training operations of matrix products with these weights: 2 · 3 for each active element, 2 · 2 if it is frozen
    (LoRA). These are the operations that are necessary: the adapters of experts are computed with more."""
    return sum(2 * (FROZEN_PASSES if p.frozen else TRAINING_PASSES) * p.active for p in found if p.multiplies)


def mtp_core_flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """Operations of a multi-token prediction module besides its own weights: its mixers' cores, and the head again."""
    assert spec.mtp is not None
    cores = sum(core_flops_per_token(spec, symbol, seq_len) for symbol in spec.mtp.layer)
    return matrix_flops_per_token([head(spec)]) + cores


def flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """Operations to train on one token at `seq_len`: matrix products, attention core and scan, without
    recomputation."""
    cores = sum(TRAINING_PASSES * section.core_flops(seq_len) for _, section in spec.trunk())
    if spec.mtp:
        cores += spec.mtp.depth * mtp_core_flops_per_token(spec, seq_len)
    return matrix_flops_per_token(parameters(spec)) + cores
