"""`train.batch.micro_batch_rows: auto` by arithmetic: the largest micro-batch that memory allows. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from trainer.arithmetic.memory import step_memory
from trainer.parallel.layout import Layout
from trainer.spec import CPU_TOKENS, TrainSpec

GIB = 2**30


class Rows(NamedTuple):
    """Rows of a micro-batch, and in words why."""

    number: int
    why: str


def fitting(spec: TrainSpec, layout: Layout, gpu_bytes: float | None) -> Rows:
    """The most rows that fit; the least possible number if none does, of which the check of memory tells then.

    Args:
        gpu_bytes: memory of the smallest GPU; None for CPUs, where larger micro-batches are no faster from a few
            thousand tokens on.

    Raises:
        SpecError: the ranks cannot share a step equally.
    """
    choices = spec.row_choices(layout.world)
    if gpu_bytes is None:
        few = [rows for rows in choices if rows * spec.tokens.seq_len <= CPU_TOKENS]
        return Rows(max(few, default=choices[0]), f"at most {CPU_TOKENS:,} tokens on a CPU")
    totals = {rows: step_memory(spec.with_rows(rows), layout).total for rows in choices}
    rows = max((each for each, total in totals.items() if total <= gpu_bytes), default=choices[0])
    why = f"{totals[rows] / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB by arithmetic"
    larger = next((each for each in choices if each > rows), None)
    return Rows(rows, why if larger is None else f"{why}; {larger} rows would take {totals[larger] / GIB:.1f}")
