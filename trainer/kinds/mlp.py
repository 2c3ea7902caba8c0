"""MLP (`-`): what is known of it without torch. `trainer.model.mlp` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from trainer.kinds.base import RESIDUAL, Count, Kind, ModelShape, Parameter, Widths, matrix


class MlpSpec(Kind):
    symbol: ClassVar[str] = "-"
    label: ClassVar[str] = "MLP"
    mixer: ClassVar[str] = "trainer.model.mlp:SquaredReluMlp"
    recomputed: ClassVar[str] = "norm, squared ReLU"

    width: Count

    def widths(self) -> str:
        return f"{self.width}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        yield matrix("up.weight", self.width, model.hidden)
        yield matrix("down.weight", model.hidden, self.width, RESIDUAL)

    def kept(self, hidden: int, widths: Widths) -> int:
        return 2 * self.width * widths.product  # after ReLU and after squaring

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return self.width * widths.product
