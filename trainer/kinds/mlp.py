"""MLP (`-`): what is known of it without torch. `trainer.model.mlp` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from trainer.kinds.base import (
    RESIDUAL,
    Activation,
    Count,
    Kind,
    ModelShape,
    Parameter,
    Part,
    Stage,
    Widths,
    bias,
    first_rows,
    halves,
    matrix,
    two_products,
)


class MlpSpec(Kind):
    """down · act(up · x): squared ReLU (So et al. 2021), or SwiGLU (Shazeer 2020), silu(gate · x) · (up · x)."""

    symbol: ClassVar[str] = "-"
    label: ClassVar[str] = "MLP"
    mixer: ClassVar[str] = "trainer.model.mlp:Mlp"
    recomputed: ClassVar[str] = "norm, activation"

    width: Count
    activation: Activation = "relu2"
    bias: bool = False

    @property
    def first(self) -> str:
        """Name of the first matrix; with a gate, that and the other one below it."""
        return "gate_up" if self.activation == "swiglu" else "up"

    def widths(self) -> str:
        return f"{self.width}" if self.activation == "relu2" else f"{self.width}, SwiGLU"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        rows = first_rows(self.activation, self.width)
        yield matrix(f"{self.first}.weight", sum(rows), model.hidden, blocks=rows)
        if self.bias:
            yield bias(f"{self.first}.bias", sum(rows))
        yield matrix("down.weight", model.hidden, self.width, RESIDUAL)
        if self.bias:
            yield bias("down.bias", model.hidden)

    def parts(self) -> Iterator[Part]:
        for leaf in ("weight", "bias") if self.bias else ("weight",):
            if self.activation == "swiglu":
                yield from halves(f"gate_proj.{leaf}", f"up_proj.{leaf}", f"{self.first}.{leaf}", self.width)
            else:
                yield Part(f"up_proj.{leaf}", f"{self.first}.{leaf}")
            yield Part(f"down_proj.{leaf}", f"down.{leaf}")

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        first, weights = sum(first_rows(self.activation, self.width)), (f"{self.first}.weight", "down.weight")
        yield two_products(self.label, weights, model.hidden, first, self.width)

    def kept(self, hidden: int, widths: Widths) -> int:
        """After the first product (of squared ReLU: after ReLU), and after the activation."""
        return (sum(first_rows(self.activation, self.width)) + self.width) * widths.product

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return sum(first_rows(self.activation, self.width)) * widths.product
