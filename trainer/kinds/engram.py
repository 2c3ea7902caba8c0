"""Engram (`N`): what is known of it without torch. `trainer.model.engram` computes it, `ngrams.py` has its integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from trainer.kinds.base import (
    FP32_BYTES,
    INDEX_BYTES,
    RESIDUAL,
    ZEROS,
    Cached,
    Convolution,
    Count,
    ModelShape,
    Parameter,
    PlacedKind,
    Stage,
    Widths,
    matrix,
    product,
    table,
    vector,
)
from trainer.kinds.ngrams import table_primes


class EngramSpec(PlacedKind):
    """Hashed n-gram memory (arXiv 2601.07372) of one layer: orders 2..max_order, `num_heads` tables for each."""

    symbol: ClassVar[str] = "N"
    label: ClassVar[str] = "Engram"
    mixer: ClassVar[str] = "trainer.model.engram:Engram"
    pre_norm: ClassVar[bool] = False  # it normalises the hidden state inside its gate
    recomputed: ClassVar[str] = "all of it"

    max_order: Annotated[int, Field(ge=2, le=8)] = 3
    rows_per_head: Count
    width_per_order: Count
    num_heads: Count = 8
    conv_kernel: Count = 4
    compress_tokens: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width_per_order % self.num_heads:
            raise ValueError(f"width_per_order {self.width_per_order} must be a multiple of num_heads {self.num_heads}")
        return self

    @property
    def d_mem(self) -> int:
        return (self.max_order - 1) * self.width_per_order

    def primes(self, model: ModelShape) -> list[int]:
        """Rows of each of its tables."""
        engrams = model.sections(EngramSpec)
        return next(p for e, p in zip(engrams, table_primes(engrams), strict=True) if e.layer == self.layer)

    def widths(self) -> str:
        tables = f"{self.num_heads} × {self.rows_per_head} rows × {self.width_per_order // self.num_heads}"
        return f"orders 2..{self.max_order}, each {tables}"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        # Rows are looked up, few at a time, so they step faster and never shrink between visits.
        width = self.width_per_order // self.num_heads
        yield table("tables.weight", sum(self.primes(model)), width, decay=False, engram_rate=True)
        yield matrix("key_proj.weight", model.hidden, self.d_mem)
        yield matrix("value_proj.weight", model.hidden, self.d_mem, RESIDUAL)
        for name in ("key_norm", "query_norm", "conv_norm"):
            yield vector(f"{name}.weight", model.hidden)
        yield vector("conv.weight", model.hidden, self.conv_kernel, init=ZEROS, decay=True)

    def adaptable(self, model: ModelShape) -> Iterator[Parameter]:
        """None: its tables hold what it learns, not its matrices."""
        yield from ()

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        hidden, tables = model.hidden, (self.max_order - 1) * self.num_heads
        # Rows and their indices are read, what was found written; backward reads its gradient and adds it to the rows'.
        yield Stage("Engram lookups", moved=2 * self.d_mem, wide=3 * self.d_mem + 4 * tables)
        yield product("Engram projections", ("key_proj.weight", "value_proj.weight"), self.d_mem, 2 * hidden)
        # Key, value and stream are read, the result written; backward reads them and its gradient, and writes three.
        yield Stage("Engram gate and convolution", moved=11 * hidden)

    def kept(self, hidden: int, widths: Widths) -> int:
        """Memory as it is found, keys and values, the four norms, gate and convolution."""
        narrow = widths.product < FP32_BYTES
        tables = (self.max_order - 1) * self.num_heads
        found = self.d_mem * (2 * widths.product if narrow else FP32_BYTES) + tables * INDEX_BYTES
        compared = 2 * hidden * FP32_BYTES  # by the gate, in fp32
        return found + compared + hidden * (widths.stream + 5 * widths.product) + 8 * FP32_BYTES

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return 0

    def cached(self, model: ModelShape) -> tuple[Cached, ...]:
        """The last tokens of n-grams, and the inputs that the convolution still needs."""
        return (
            Cached("ids", (self.max_order - 1,), dtype="int64"),
            Cached("conv", ((self.conv_kernel - 1) * self.max_order, model.hidden)),
        )

    def convolutions(self, hidden: int) -> tuple[Convolution, ...]:
        return (Convolution(self.conv_kernel, self.max_order, (hidden,)),)

    def shifts(self, hidden: int) -> set[int]:
        return super().shifts(hidden) | set(range(1, self.max_order))  # the tokens of an n-gram

    def stand_in(self, table_rows: int) -> EngramSpec:
        return self.updated(
            {"layer": 0, "rows_per_head": min(self.rows_per_head, table_rows), "compress_tokens": False}
        )
