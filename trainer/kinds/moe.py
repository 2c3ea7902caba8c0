"""Mixture of experts (`E`): what is known of it without torch. `trainer.model.moe` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from trainer.kinds.base import (
    FP32_BYTES,
    INDEX_BYTES,
    NORMAL,
    RESIDUAL,
    Count,
    Init,
    Kind,
    ModelShape,
    Parameter,
    Widths,
    matrix,
)


class MoeSpec(Kind):
    """Routed experts with sigmoid scores; balanced by a bias on the choice and a small sequence loss."""

    symbol: ClassVar[str] = "E"
    label: ClassVar[str] = "experts"
    mixer: ClassVar[str] = "trainer.model.moe:Moe"
    recomputed: ClassVar[str] = "norm"

    num_experts: Count
    top_k: Count
    expert_width: Count
    shared_width: Annotated[int, Field(ge=0)] = 0
    score_scale: Annotated[float, Field(gt=0)] = 2.5
    bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    sequence_loss_weight: Annotated[float, Field(ge=0)] = 1e-4

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        if self.top_k == 1 and self.num_experts > 1:
            raise ValueError("top_k 1 gives the router no gradient (one renormalised weight is always 1); raise it")
        return self

    def widths(self) -> str:
        shared = f", shared {self.shared_width}" if self.shared_width else ""
        return f"{self.num_experts} × {self.expert_width}, top {self.top_k}{shared}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        hidden, width = model.hidden, self.expert_width
        yield self._experts("up_EFD", width, hidden, NORMAL)
        yield self._experts("down_EDF", hidden, width, RESIDUAL)
        exact = "routing is FP32: a small error changes the choice"
        yield matrix("router.weight", self.num_experts, hidden, high_precision=exact, whole=True)
        if self.shared_width:
            yield matrix("shared_up.weight", self.shared_width, hidden)
            yield matrix("shared_down.weight", hidden, self.shared_width, RESIDUAL)

    def _experts(self, name: str, rows: int, columns: int, init: Init) -> Parameter:
        return Parameter(name, (self.num_experts, rows, columns), self.top_k * rows * columns, init, per_expert=True)

    def kept(self, hidden: int, widths: Widths) -> int:
        """Scores, choices and weights, two orders of the copies, and their hidden layer before its activation."""
        by_copy = 3 * INDEX_BYTES + 2 * FP32_BYTES + self.expert_width * widths.product
        if widths.keeps_copies:
            by_copy += (hidden + 2 * self.expert_width) * widths.product
        shared = 2 * self.shared_width * widths.product
        return self.num_experts * FP32_BYTES + self.top_k * by_copy + 2 * FP32_BYTES + shared

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return hidden * widths.product + self.kept(hidden, widths)
