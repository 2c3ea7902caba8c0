"""Mamba-2 (`M`): what is known of it without torch. `trainer.model.mamba2` computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import model_validator

from trainer.kinds.base import (
    FP32_BYTES,
    RESIDUAL,
    Cached,
    Convolution,
    Count,
    Init,
    Kind,
    ModelShape,
    Parameter,
    Part,
    Stage,
    Widths,
    matrix,
    product,
    vector,
)

A_INIT = Init("log_uniform", 1.0, 16.0)
DT_INIT = Init("softplus_inverse", 1e-3, 1e-1, floor=1e-4)


class MambaSpec(Kind):
    """Mamba-2 mixer (Dao & Gu 2024): d_inner = num_heads · head_dim."""

    symbol: ClassVar[str] = "M"
    label: ClassVar[str] = "Mamba-2"
    mixer: ClassVar[str] = "trainer.model.mamba2:Mamba2"
    recomputed: ClassVar[str] = "norm, convolution, scan, gated norm"
    training_only: ClassVar[frozenset[str]] = frozenset({"chunk_size"})

    num_heads: Count
    head_dim: Count = 64
    d_state: Count = 128
    num_groups: Count = 1
    conv_kernel: Count = 4
    chunk_size: Count = 128

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def state_width(self) -> int:
        """Columns of B, and of C."""
        return self.num_groups * self.d_state

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.state_width

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}")
        return self

    def widths(self) -> str:
        return f"{self.num_heads} heads × {self.head_dim}, state {self.d_state}, groups {self.num_groups}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        filters = Init("uniform", -1 / math.sqrt(self.conv_kernel), 1 / math.sqrt(self.conv_kernel))
        yield vector("A_log", self.num_heads, init=A_INIT)
        yield vector("D", self.num_heads)
        yield vector("dt_bias", self.num_heads, init=DT_INIT)
        blocks = (self.d_inner, self.d_inner, self.state_width, self.state_width)  # z, x, B, C
        yield matrix("zxbc_proj.weight", sum(blocks), model.hidden, blocks=blocks)
        few = "time steps are exponentiated, and it has few rows"
        yield matrix("dt_proj.weight", self.num_heads, model.hidden, high_precision=few)
        yield vector("conv.weight", self.conv_dim, self.conv_kernel, init=filters, decay=True)
        yield vector("conv.bias", self.conv_dim, init=filters)
        yield vector("norm.weight", self.d_inner)
        yield matrix("out_proj.weight", model.hidden, self.d_inner, RESIDUAL)

    def cached(self, model: ModelShape) -> tuple[Cached, ...]:
        """The inputs that the convolution still needs, and the state."""
        state = (self.num_heads, self.head_dim, self.d_state)
        return Cached("conv", (self.conv_kernel - 1, self.conv_dim)), Cached("state", state, dtype="fp32")

    def parts(self) -> Iterator[Part]:
        rows = self.d_inner + self.conv_dim
        yield Part("in_proj.weight", "zxbc_proj.weight")
        yield Part("in_proj.weight", "dt_proj.weight", their_first=rows)
        for leaf in ("weight", "bias"):
            yield Part(f"conv1d.{leaf}", f"conv.{leaf}")
        for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"):
            yield Part(name, name)

    def core_flops(self, seq_len: int) -> int:
        """SSD by the chunked algorithm with Q positions in a chunk: C·Bᵀ for each group; masked product, state in and
        state out for each head."""
        chunk, state, width = self.chunk_size, self.d_state, self.head_dim
        by_head = self.num_heads * (2 * chunk * width + 4 * state * width)
        return self.num_groups * 2 * chunk * state + by_head

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        inner, conv, groups, heads = self.d_inner, self.conv_dim, 2 * self.state_width, self.num_heads
        first = ("zxbc_proj.weight", "dt_proj.weight")
        yield product("Mamba-2 projections", first, model.hidden, inner + conv + heads)
        yield product("Mamba-2 projections", ("out_proj.weight",), inner, model.hidden)
        # SiLU with it: forward reads and writes a channel; backward reads it and the gradient, and writes one.
        yield Stage("Mamba-2 convolution", moved=5 * conv)
        # Forward reads x, B, C and writes y; backward reads x, B, C, y's gradient and writes those of x, B, C.
        moved = 5 * inner + 3 * groups
        yield Stage("Mamba-2 scan", moved=moved, wide=3 * heads, flops=self.core_flops(seq_len))
        yield Stage("norms and additions", moved=8 * inner)  # gated: y, z, result; its gradient, y, z, two gradients

    def kept(self, hidden: int, widths: Widths) -> int:
        inner, heads, chunk = self.d_inner, self.num_heads, self.chunk_size
        narrow = widths.product < FP32_BYTES
        projected = (inner + self.conv_dim) * widths.product
        convolved = 2 * self.conv_dim * widths.product  # before and after SiLU
        gated_norm = 2 * inner * widths.product + self.num_groups * FP32_BYTES
        time_steps = heads * (6 * FP32_BYTES + 8)
        within_chunk = 2 * heads * chunk * FP32_BYTES
        wide_copies = (2 * inner + 2 * self.state_width) * FP32_BYTES if narrow else 0
        weighted = (inner * FP32_BYTES) * 3 + (inner * widths.product if narrow else 0)
        states = 2 * inner * self.d_state * FP32_BYTES // chunk
        return projected + convolved + gated_norm + time_steps + within_chunk + wide_copies + weighted + states

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return (self.d_inner + self.conv_dim + self.num_heads) * widths.product

    def convolutions(self, hidden: int) -> tuple[Convolution, ...]:
        # d_inner: where x, B, C begin in the rows of their projection
        return (Convolution(self.conv_kernel, 1, (self.d_inner, self.conv_dim)),)
