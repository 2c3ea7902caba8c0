"""Which weights multiply in FP8 and which do not, with the reason for each. Imports no torch.

Converted are the large products inside the layers; with `fp8.head` also the LM head, whose logits and sums stay FP32;
of experts those that are at least `fp8.experts_from` wide, as narrow ones spend more time on casts than they save. Kept
are: the router (a wrong choice costs more than it saves), the time-step projection (few rows, exponentiated),
everything that is looked up or applied element by element, the layers at both ends of the network, and matrices whose
sides FP8 kernels cannot tile.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from trainer.kinds.base import NO_PRODUCT, Parameter
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.spec import Fp8Spec

HEAD = "head.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Conversion:
    """One weight.

    Attributes:
        kind: its name without the place, "zxbc_proj" say.
        active: elements that multiply one token, 0 where nothing is multiplied.
        reason: why it is kept, or which blocks it is cut into.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    active: int
    converted: bool
    reason: str


def conversion_table(model: ModelSpec, fp8: Fp8Spec, experts_problem: str | None = None) -> list[Conversion]:
    """Every parameter of the model, in its order.

    Args:
        experts_problem: why the implementation at hand has no grouped FP8 product for the experts; None if it has.
    """
    rows = []
    for parameter in parameters(model):
        kind = parameter.name.removesuffix(".weight").rpartition(".")[2]
        active = parameter.active if parameter.multiplies else 0
        problem = _why_kept(model, fp8, parameter) or (experts_problem if parameter.per_expert else None)
        reason = problem or f"sides are multiples of {fp8.side_multiple}"
        rows.append(Conversion(parameter.name, kind, parameter.shape, active, problem is None, reason))
    return rows


def _why_kept(model: ModelSpec, fp8: Fp8Spec, parameter: Parameter) -> str | None:
    if parameter.name == HEAD and fp8.head:
        return _why_not_head(fp8) or _untiled(fp8, parameter)
    if parameter.high_precision:
        return parameter.high_precision
    if parameter.per_expert and model.moe and model.moe.expert_width < (fp8.experts_from or 0):
        return f"experts are {model.moe.expert_width} wide, FP8 is used from {fp8.experts_from} on"
    layer = _LAYER.match(parameter.name)
    if layer is None:
        return "not part of a layer"
    if not fp8.bf16_end_layers <= int(layer[1]) < len(model.layers) - fp8.bf16_end_layers:
        return f"in the first or last {fp8.bf16_end_layers} layers"
    return _untiled(fp8, parameter)


def _untiled(fp8: Fp8Spec, parameter: Parameter) -> str | None:
    if odd := [side for side in parameter.shape[-2:] if side % fp8.side_multiple]:
        return f"side {odd[0]} is not a multiple of {fp8.side_multiple}"
    return None


def _why_not_head(fp8: Fp8Spec) -> str | None:
    """The cross-entropy computes its products by chunks of tokens, which are not a module."""
    if fp8.implementation == "te":
        return "Transformer Engine converts modules, and the cross-entropy is none"
    return "the cross-entropy is not computed in blocks" if fp8.recipe == "block128" else None


def share(rows: list[Conversion]) -> float:
    """Part of the matrix products' operations that FP8 does."""
    return sum(row.active for row in rows if row.converted) / sum(row.active for row in rows)


def summary(rows: list[Conversion]) -> list[str]:
    """One line for each kind of weight and reason, the converted ones first."""
    counts = Counter((not row.converted, row.kind, row.reason) for row in rows if row.reason != NO_PRODUCT)
    return [
        f"{'BF16' if kept else 'FP8 '} {count:4d} × {kind}: {reason}"
        for (kept, kind, reason), count in sorted(counts.items())
    ]


def render(rows: list[Conversion], title: str, console: Console) -> None:
    """Print `summary` as a table."""
    table = Table(title=f"{title}: {share(rows):.0%} of the products' operations in FP8")
    for column in ("precision", "weights", "kind", "why"):
        table.add_column(column, justify="right" if column == "weights" else "left")
    for line in summary(rows):
        precision, count, rest = line.split(maxsplit=2)
        kind, _, reason = rest.removeprefix("× ").partition(": ")
        table.add_row(precision, count, kind, reason)
    console.print(table)
