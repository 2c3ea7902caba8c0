"""μP: how initialisation and learning rates depend on the widths, so that those found on a narrow model hold on a wide
one (Yang et al., arXiv 2203.03466). Imports no torch.

All of it follows from the spectral condition (Yang, Simon and Bernstein, arXiv 2310.17813): a matrix W [m, n] and each
of its updates must have a spectral norm that grows as √(m/n); then activations, and what a step changes in them, have
the same size at every width. Write b for `base_hidden`; at m = n = b nothing differs from the plain parametrisation.

    initialisation   a Gaussian matrix has the norm σ(√m + √n)           σ = init_std · 2√b · √(m/n) / (√m + √n)
    Muon             lr · 0.2·√max(m, n) · ortho has norm lr · 0.2·√max(m, n), so that factor becomes 0.2·√(b·m/n)
    AdamW            an update whose elements are ±lr and agree has norm lr·√(m·n)                     lr ← lr · b/n

So Muon with the scale √max(m, n) that matches AdamW's root mean square is not independent of width: its rates would
have to fall as 1/√width. (Programs that exempt Muon from μP use a scale like √(m/n).) The decay of AdamW's matrices is
multiplied by n/b, so that lr · decay is unchanged.

This applies to matrices between two widths. Tables and per-channel parameters (embedding, Engram tables, norms,
convolutions, A, D, dt_bias) keep init and rate. So does the LM head, whose input is multiplied by b/hidden instead.
Products of two aligned vectors grow with their length, not its root: attention scores are divided by
head_dim/√(base_head_dim) instead of √head_dim, Engram's gate by hidden/√b instead of √hidden.
"""

from __future__ import annotations

import math

from trainer.modelspec import ModelSpec

MUON_RMS = 0.2


def init_std(spec: ModelSpec, rows: int, columns: int) -> float:
    """σ of a matrix [rows, columns] between two widths, before any factor for depth."""
    if spec.mup is None:
        return spec.init_std
    both = math.sqrt(rows) + math.sqrt(columns)
    return spec.init_std * 2 * math.sqrt(spec.mup.base_hidden * rows / columns) / both


def adamw_factor(spec: ModelSpec, columns: int) -> float:
    """Factor on AdamW's rate for a matrix with this many columns; its inverse is the factor on the decay."""
    return spec.mup.base_hidden / columns if spec.mup else 1.0


def output_factor(spec: ModelSpec) -> float:
    """Factor on the input of the LM head."""
    return spec.mup.base_hidden / spec.hidden if spec.mup else 1.0


def attention_factor(spec: ModelSpec) -> float:
    """Factor on the queries, besides the usual 1/√head_dim."""
    assert spec.attention is not None
    base = spec.mup.base_head_dim if spec.mup else None
    return math.sqrt(base / spec.attention.head_dim) if base else 1.0


def gate_factor(spec: ModelSpec) -> float:
    """Factor on the product of key and query in Engram's gate, besides the usual 1/√hidden."""
    return math.sqrt(spec.mup.base_hidden / spec.hidden) if spec.mup else 1.0
