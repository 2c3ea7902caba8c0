"""Which weights multiply in FP8 and which do not, with the reason for each. Imports no torch.

Converted are the large products inside the layers. Kept are: the router (a wrong choice costs more than it saves), the
time-step projection (few rows, exponentiated), the LM head (its logits are the loss), everything that is looked up or
applied element by element, the layers at both ends of the network, and matrices whose sides FP8 kernels cannot tile.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from trainer.arithmetic.flops import parameters
from trainer.modelspec import ModelSpec
from trainer.spec import Fp8Spec

_MIXER = re.compile(r"layers\.(\d+)\.\d+\.mixer\.(\w+?)(?:\.weight)?")
_EXPERTS = {"up_EFD", "down_EDF"}
_CONVERTED = _EXPERTS | {
    *("zxbc_proj", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("up", "down", "shared_up", "shared_down"),
    *("key_proj", "value_proj"),
}
_KEPT = {
    "head": "LM head: its logits are the loss",
    "embedding": "looked up, not multiplied",
    "tables": "looked up, not multiplied",
    "router": "routing is FP32: a small error changes the choice",
    "dt_proj": "time steps are exponentiated, and it has few rows",
}


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
        match = _MIXER.fullmatch(parameter.name)
        kind = match[2] if match else parameter.name.removesuffix(".weight").rpartition(".")[2]
        active = parameter.active if parameter.multiplies else 0
        problem = _why_kept(model, fp8, kind, parameter.shape, int(match[1]) if match else None)
        if problem is None and kind in _EXPERTS:
            problem = experts_problem
        reason = problem or f"sides are multiples of {fp8.side_multiple}"
        rows.append(Conversion(parameter.name, kind, parameter.shape, active, problem is None, reason))
    return rows


def _why_kept(model: ModelSpec, fp8: Fp8Spec, kind: str, shape: tuple[int, ...], layer: int | None) -> str | None:
    if kind not in _CONVERTED or layer is None:
        return _KEPT.get(kind, "no matrix product" if kind not in _CONVERTED else "not part of a layer")
    if layer < fp8.bf16_end_layers or layer >= len(model.layers) - fp8.bf16_end_layers:
        return f"in the first or last {fp8.bf16_end_layers} layers"
    if odd := [side for side in shape[-2:] if side % fp8.side_multiple]:
        return f"side {odd[0]} is no multiple of {fp8.side_multiple}"
    return None


def share(rows: list[Conversion]) -> float:
    """Part of the matrix products' operations that FP8 does."""
    return sum(row.active for row in rows if row.converted) / sum(row.active for row in rows)


def summary(rows: list[Conversion]) -> list[str]:
    """One line for each kind of weight and reason, the converted ones first."""
    counts = Counter((not row.converted, row.kind, row.reason) for row in rows if row.active or row.kind in _KEPT)
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
