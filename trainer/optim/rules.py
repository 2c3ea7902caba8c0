"""Which optimizer trains which parameter, and how a stored matrix is cut before Muon orthogonalises it.

One table, matched by name, because a shape cannot tell: an embedding and a projection are both 2-D. Muon treats a
matrix as one linear map, so matrices that are stored together for speed (attention heads, z|x|B|C, experts) are cut
into the maps they are. Under TEON the same block of successive attention layers is orthogonalised jointly; the table
says with whom. A parameter that no rule names is an error: a silent default would train a new layer wrongly.

Imports no torch: the table can be printed and tested without it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from trainer.modelspec import ModelSpec
from trainer.mup import adamw_factor
from trainer.spec import OptimizerSpec

OptimizerName = Literal["muon", "adamw"]
Rows = tuple[int, ...]

STATE_BYTES = {"fp32": 4, "bf16": 2}


def _query_heads(spec: ModelSpec) -> Rows:
    assert spec.attention is not None
    return (spec.attention.head_dim,) * spec.attention.num_heads


def _key_value_heads(spec: ModelSpec) -> Rows:
    assert spec.attention is not None
    return (spec.attention.head_dim,) * spec.attention.num_kv_heads


def _zxbc(spec: ModelSpec) -> Rows:
    assert spec.mamba is not None
    state = spec.mamba.num_groups * spec.mamba.d_state
    return (spec.mamba.d_inner, spec.mamba.d_inner, state, state)


@dataclass(frozen=True)
class Rule:
    """One line of the table: parameters whose full name matches `pattern`.

    `blocks` gives the row counts of the blocks of a 2-D weight (None: one block; a 3-D weight is always one block for
    each index of its first dimension). `teon`: layers may be stacked. `engram_rate` multiplies the rate by
    `adamw.engram_rate_factor`.
    """

    pattern: str
    optimizer: OptimizerName
    blocks: Callable[[ModelSpec], Rows] | None = None
    decay: bool = True
    teon: bool = False
    engram_rate: bool = False


_TRUNK = r"layers\.\d+\.\d+"
_SUBLAYER = r"(layers\.\d+|mtp\.\d+\.layer)\.\d+\."
_MIXER = _SUBLAYER + r"mixer\."

RULES: tuple[Rule, ...] = (
    Rule(r"embedding\.weight|head\.weight", "adamw"),
    Rule(r"final_norm\.weight|" + _SUBLAYER + r"norm\.weight", "adamw", decay=False),
    # multi-token prediction; its layers are as any other
    Rule(r"mtp\.\d+\.proj\.weight", "muon"),
    Rule(r"mtp\.\d+\.(hidden_norm|token_norm|head_norm)\.weight", "adamw", decay=False),
    # Mamba-2
    Rule(_MIXER + r"zxbc_proj\.weight", "muon", blocks=_zxbc),
    Rule(_MIXER + r"(dt_proj|out_proj)\.weight", "muon"),
    Rule(_MIXER + r"(A_log|D|dt_bias|conv\.bias|norm\.weight)", "adamw", decay=False),
    # attention
    Rule(_MIXER + r"q_proj\.weight", "muon", blocks=_query_heads, teon=True),
    Rule(_MIXER + r"(k_proj|v_proj)\.weight", "muon", blocks=_key_value_heads, teon=True),
    Rule(_MIXER + r"o_proj\.weight", "muon"),
    # experts and MLP
    Rule(_MIXER + r"(router|shared_up|shared_down|up|down)\.weight", "muon"),
    Rule(_MIXER + r"(up_EFD|down_EDF)", "muon"),
    # Engram: rows are looked up, few at a time, so they step faster and never shrink between visits
    Rule(_MIXER + r"tables\.weight", "adamw", decay=False, engram_rate=True),
    Rule(_MIXER + r"(key_proj|value_proj)\.weight", "muon"),
    Rule(_MIXER + r"(key_norm|query_norm|conv_norm)\.weight", "adamw", decay=False),
    # depthwise convolutions of Mamba-2 and Engram: one small filter for each channel, not a map between spaces
    Rule(_MIXER + r"conv\.weight", "adamw"),
)


@dataclass(frozen=True)
class Assignment:
    """What one parameter gets.

    Attributes:
        rate_factor, decay_factor: on the optimizer's learning rate and weight decay.
        block_rows: rows of its blocks (empty: not cut, or 3-D).
        stack: names of the parameters whose blocks are orthogonalised side by side, its own among them, in the order
            of the layers; its own alone without TEON; empty for AdamW.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: OptimizerName
    block_rows: Rows
    stack: tuple[str, ...]
    rate_factor: float
    decay: bool
    decay_factor: float = 1.0

    @property
    def moments(self) -> int:
        """Numbers kept for each weight between steps: Muon has a momentum, AdamW two moments."""
        return 1 if self.optimizer == "muon" else 2


def assign(
    parameters: Iterable[tuple[str, tuple[int, ...]]], spec: OptimizerSpec, model: ModelSpec
) -> list[Assignment]:
    """The table applied to (name, shape) pairs, in their order. `spec.name` "adamw" moves all of Muon's to AdamW.

    Raises:
        ValueError: a parameter that no rule or more than one rule names, or blocks that do not fill its rows.
    """
    table, kinds = [], defaultdict(list)
    for name, shape in parameters:
        rule = _rule(name)
        table.append(_assign_one(rule, name, tuple(shape), spec, model))
        if rule.teon and table[-1].optimizer == "muon":
            # Modules that predict further ahead follow no layer of their kind: only trunk layers have one kind.
            kinds[re.sub(_TRUNK, "", name)].append(name)
    stacks: dict[str, tuple[str, ...]] = {}
    for names in kinds.values():
        names.sort(key=_layer_number)
        for first in range(0, len(names) - spec.muon.teon_layers + 1, spec.muon.teon_layers):
            stack = tuple(names[first : first + spec.muon.teon_layers])
            stacks |= dict.fromkeys(stack, stack)
    return [replace(entry, stack=stacks.get(entry.name, entry.stack)) for entry in table]


def _layer_number(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _rule(name: str) -> Rule:
    matches = [rule for rule in RULES if re.fullmatch(rule.pattern, name)]
    if len(matches) != 1:
        problem = "no rule names" if not matches else f"{len(matches)} rules name"
        raise ValueError(f"{problem} the parameter {name}; give it exactly one line in RULES of trainer/optim/rules.py")
    return matches[0]


def _assign_one(rule: Rule, name: str, shape: tuple[int, ...], spec: OptimizerSpec, model: ModelSpec) -> Assignment:
    rate = spec.adamw.engram_rate_factor if rule.engram_rate else 1.0
    if rule.optimizer == "adamw":
        return Assignment(name, shape, "adamw", (), (), rate, rule.decay)
    if spec.name == "adamw":
        width = adamw_factor(model, shape[-1])
        return Assignment(name, shape, "adamw", (), (), rate * width, rule.decay, 1 / width)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} has shape {shape}; Muon takes matrices [m, n] or stacks of them [N, m, n]")
    rows = rule.blocks(model) if rule.blocks else ()
    if rows and (len(shape) != 2 or sum(rows) != shape[0]):
        raise ValueError(f"{name} has shape {shape}, but its blocks have {'+'.join(map(str, rows))} rows")
    return Assignment(name, shape, "muon", rows, (name,), rate, rule.decay)


def render(assignments: Iterable[Assignment]) -> str:
    """The applied table as aligned text, one line for each parameter."""
    lines = [("parameter", "shape", "optimizer", "blocks", "rate", "decay", "stacked with")]
    for a in assignments:
        count = a.shape[0] if len(a.shape) == 3 else max(1, len(a.block_rows))
        blocks = str(count) if a.optimizer == "muon" else "-"
        shape = "×".join(map(str, a.shape)) or "scalar"
        others = " ".join(name for name in a.stack if name != a.name) or "-"
        decay = "yes" if a.decay else "no"
        lines.append((a.name, shape, a.optimizer, blocks, f"×{a.rate_factor:g}", decay, others))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
