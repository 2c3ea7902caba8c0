"""Grouped-query attention (`*`): what is known of it without torch. `trainer.model.attention` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from trainer.kinds.base import (
    FP32_BYTES,
    RESIDUAL,
    Cached,
    Count,
    Kind,
    ModelShape,
    Parameter,
    Part,
    RopeScalingSpec,
    Rotation,
    Stage,
    Widths,
    bias,
    matrix,
    product,
    vector,
)


class AttentionSpec(Kind):
    """Grouped-query attention; no position embedding unless `rope_theta` is given.

    `qk_norm`: an RMSNorm of each query and key head, before they are turned (Qwen3). `bias`: of all four projections.
    """

    symbol: ClassVar[str] = "*"
    label: ClassVar[str] = "attention"
    mixer: ClassVar[str] = "trainer.model.attention:Attention"
    recomputed: ClassVar[str] = "norm"
    attends: ClassVar[bool] = True

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count = 64
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: RopeScalingSpec | None = None
    qk_norm: bool = False
    bias: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, as rope_theta turns pairs of channels")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise ValueError("rope_scaling changes rotations, but rope_theta, their base, is missing; give it")
        return self

    @property
    def rotation(self) -> Rotation | None:
        return None if self.rope_theta is None else Rotation(self.rope_theta, self.head_dim, self.rope_scaling)

    def widths(self) -> str:
        return f"{self.num_heads} query, {self.num_kv_heads} key/value heads × {self.head_dim}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        query, key = (self.head_dim,) * self.num_heads, (self.head_dim,) * self.num_kv_heads
        for name, heads in (("q", query), ("k", key), ("v", key)):
            yield matrix(f"{name}_proj.weight", sum(heads), model.hidden, blocks=heads, teon=True)
            if self.bias:
                yield bias(f"{name}_proj.bias", sum(heads))
        yield matrix("o_proj.weight", model.hidden, sum(query), RESIDUAL)
        if self.bias:
            yield bias("o_proj.bias", model.hidden)
        if self.qk_norm:
            yield vector("q_norm.weight", self.head_dim)
            yield vector("k_norm.weight", self.head_dim)

    def cached(self, model: ModelShape) -> tuple[Cached, ...]:
        return tuple(Cached(name, (self.num_kv_heads, self.head_dim), per_position=True) for name in ("k", "v"))

    def parts(self) -> Iterator[Part]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Part(f"{name}.weight", f"{name}.weight")
            if self.bias:
                yield Part(f"{name}.bias", f"{name}.bias")
        for name in ("q_norm", "k_norm") if self.qk_norm else ():
            yield Part(f"{name}.weight", f"{name}.weight")

    def core_flops(self, seq_len: int) -> int:
        """q·kᵀ and the weighted sum over the (seq_len)/2 positions that a causal query sees on average."""
        return 2 * seq_len * self.num_heads * self.head_dim

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        heads, pairs = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        first = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        yield product("attention projections", first, model.hidden, heads + pairs)
        yield product("attention projections", ("o_proj.weight",), heads, model.hidden)
        # Without the scores: forward reads q, k, v and writes the result; backward reads these and the gradient, and
        # writes three. The logarithm of each query's sum is written and read.
        moved = 6 * heads + 3 * pairs
        yield Stage("attention core", moved=moved, wide=2 * self.num_heads, flops=self.core_flops(seq_len))

    def kept(self, hidden: int, widths: Widths) -> int:
        """Queries, keys, values, the result, and the logarithm of each query's sum; of norms their input and scale."""
        heads, turned = 2 * self.num_heads + 2 * self.num_kv_heads, self.num_heads + self.num_kv_heads
        normed = turned * (self.head_dim * widths.product + FP32_BYTES) if self.qk_norm else 0
        return heads * self.head_dim * widths.product + self.num_heads * FP32_BYTES + normed

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return self.kept(hidden, widths)
