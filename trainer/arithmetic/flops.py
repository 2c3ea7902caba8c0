"""Floating-point operations of a model, by arithmetic alone. Imports no torch.

Three ways to count what is active for one token are in use, and they differ by more than a tenth:

    A1  all but the input embedding, the Engram tables and the experts not chosen: what multiplies a token. NVIDIA
        counts its Nemotron models so, and so does this project wherever it says "active".
    A2  A1 + input embedding ("including embeddings").
    A3  A1 - LM head (non-embedding; the Engram paper).
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.kinds.base import Parameter
from trainer.modelspec import ModelSpec
from trainer.parameters import head, parameters

TRAINING_PASSES = 3  # forward 1, backward 2: gradients of the inputs and of the weights


def core_flops_per_token(spec: ModelSpec, symbol: str, seq_len: int, layer: int | None = None) -> int:
    """Training operations of a mixer outside its weights, for one token of a row that is one document."""
    return TRAINING_PASSES * spec.section(symbol, layer).core_flops(seq_len)


def matrix_flops_per_token(found: Iterable[Parameter]) -> int:
    """Training operations of matrix products with these weights: 2 · 3 for each active element."""
    return TRAINING_PASSES * 2 * sum(parameter.active for parameter in found if parameter.multiplies)


def mtp_core_flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """What a module of multi-token prediction computes beside its own weights: its mixers' cores and the head again."""
    assert spec.mtp is not None
    cores = sum(core_flops_per_token(spec, symbol, seq_len) for symbol in spec.mtp.layer)
    return matrix_flops_per_token([head(spec)]) + cores


def flops_per_token(spec: ModelSpec, seq_len: int) -> int:
    """Operations to train on one token at `seq_len`: matrix products, attention core and scan, nothing recomputed."""
    cores = sum(TRAINING_PASSES * section.core_flops(seq_len) for _, section in spec.trunk())
    if spec.mtp:
        cores += spec.mtp.depth * mtp_core_flops_per_token(spec, seq_len)
    return matrix_flops_per_token(parameters(spec)) + cores
