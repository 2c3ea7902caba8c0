"""Grouped-query attention (`*`): what is known of it without torch. `trainer.model.attention` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from trainer.kinds.base import FP32_BYTES, RESIDUAL, Count, Kind, ModelShape, Parameter, Widths, matrix


class AttentionSpec(Kind):
    """Grouped-query attention; no position embedding unless `rope_theta` is given."""

    symbol: ClassVar[str] = "*"
    label: ClassVar[str] = "attention"
    mixer: ClassVar[str] = "trainer.model.attention:Attention"
    recomputed: ClassVar[str] = "norm"
    attends: ClassVar[bool] = True

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count = 64
    rope_theta: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, as rope_theta turns pairs of channels")
        return self

    @property
    def positions(self) -> bool:
        return self.rope_theta is not None

    def widths(self) -> str:
        return f"{self.num_heads} query, {self.num_kv_heads} key/value heads × {self.head_dim}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        query, key = (self.head_dim,) * self.num_heads, (self.head_dim,) * self.num_kv_heads
        yield matrix("q_proj.weight", sum(query), model.hidden, blocks=query, teon=True)
        yield matrix("k_proj.weight", sum(key), model.hidden, blocks=key, teon=True)
        yield matrix("v_proj.weight", sum(key), model.hidden, blocks=key, teon=True)
        yield matrix("o_proj.weight", model.hidden, sum(query), RESIDUAL)

    def core_flops(self, seq_len: int) -> int:
        """q·kᵀ and the weighted sum over the (seq_len)/2 positions that a causal query sees on average."""
        return 2 * seq_len * self.num_heads * self.head_dim

    def kept(self, hidden: int, widths: Widths) -> int:
        """Queries, keys, values, the result, and the logarithm of each query's sum."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return heads * self.head_dim * widths.product + self.num_heads * FP32_BYTES

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return self.kept(hidden, widths)
