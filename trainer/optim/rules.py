"""Which optimizer trains which parameter, and how a stored matrix is cut before Muon orthogonalises it.

trainer/parameters.py declares it for every parameter, because the shape is not enough: an embedding and a projection
are both 2-D. Muon treats a matrix as one linear map, so matrices that are stored together for speed (attention heads,
z|x|B|C, experts) are cut into the maps they are. Under TEON the same block of successive attention layers is
orthogonalised jointly; the table says with whom. A parameter that the model's spec does not have is an error.

Imports no torch: the table can be printed and tested without it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from trainer.kinds.base import Parameter, Rows
from trainer.modelspec import ModelSpec
from trainer.mup import adamw_factor
from trainer.parameters import parameters as parameters_of
from trainer.parameters import unknown_parameter
from trainer.spec import OptimizerSpec

OptimizerName = Literal["muon", "adamw"]

STATE_BYTES = {"fp32": 4, "bf16": 2}

_TRUNK = r"layers\.\d+\.\d+"


@dataclass(frozen=True)
class Assignment:
    """The assignment of one parameter.

    Attributes:
        rate_factor, decay_factor: on the optimizer's learning rate and weight decay.
        block_rows: rows of the blocks of a matrix (empty: not cut).
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
        """State elements per weight: Muon has a momentum, AdamW two moments."""
        return 1 if self.optimizer == "muon" else 2


def assign(
    parameters: Iterable[tuple[str, tuple[int, ...]]], spec: OptimizerSpec, model: ModelSpec
) -> list[Assignment]:
    """The assignment of each (name, shape) pair, in order. `spec.name` "adamw" moves all of Muon's to AdamW.

    Raises:
        ValueError: a parameter that the model does not have, or blocks that do not fill its rows.
    """
    known = {parameter.name: parameter for parameter in parameters_of(model)}
    table, alike = [], defaultdict(list)
    for name, shape in parameters:
        if name not in known:
            raise ValueError(unknown_parameter(name))
        table.append(_assign_one(known[name], tuple(shape), spec, model))
        if known[name].teon and table[-1].optimizer == "muon":
            alike[re.sub(_TRUNK, "", name)].append(name)
    stacks: dict[str, tuple[str, ...]] = {}
    for names in alike.values():
        names.sort(key=_layer_number)
        for first in range(0, len(names) - spec.muon.teon_layers + 1, spec.muon.teon_layers):
            stack = tuple(names[first : first + spec.muon.teon_layers])
            stacks |= dict.fromkeys(stack, stack)
    return [replace(entry, stack=stacks.get(entry.name, entry.stack)) for entry in table]


def _layer_number(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _assign_one(known: Parameter, shape: tuple[int, ...], spec: OptimizerSpec, model: ModelSpec) -> Assignment:
    name, decay = known.name, known.decay
    rate = spec.adamw.engram_rate_factor if known.engram_rate else 1.0
    if known.optimizer == "adamw":
        return Assignment(name, shape, "adamw", (), (), rate, decay)
    if spec.name == "adamw":
        width = adamw_factor(model, shape[-1])
        return Assignment(name, shape, "adamw", (), (), rate * width, decay, 1 / width)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} has shape {shape}; Muon takes matrices [m, n] or stacks of them [N, m, n]")
    if known.blocks and sum(known.blocks) != shape[-2]:
        raise ValueError(f"{name} has shape {shape}, but its blocks have {'+'.join(map(str, known.blocks))} rows")
    return Assignment(name, shape, "muon", known.blocks, (name,), rate, decay)


def render(assignments: Iterable[Assignment]) -> str:
    """The applied table as aligned text, one line for each parameter."""
    lines = [("parameter", "shape", "optimizer", "blocks", "rate", "decay", "stacked with")]
    for a in assignments:
        count = math.prod(a.shape[:-2]) * max(1, len(a.block_rows))
        blocks = str(count) if a.optimizer == "muon" else "-"
        shape = "×".join(map(str, a.shape)) or "scalar"
        others = " ".join(name for name in a.stack if name != a.name) or "-"
        decay = "yes" if a.decay else "no"
        lines.append((a.name, shape, a.optimizer, blocks, f"×{a.rate_factor:g}", decay, others))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
