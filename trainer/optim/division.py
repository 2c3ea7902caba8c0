"""Assign blocks to ranks and batches, so that each is orthogonalised exactly once. Imports no torch.

A block whose rows are all on one rank is processed there. A block that is split between ranks is gathered on one rank
of the group: the one with the least work so far, largest blocks first (greedy longest-processing-time, within 4/3 of
the optimum).

Rows of a 3-D tensor [N, m, n] are counted as those of the matrix [N·m, n].
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """Rows [start, start + rows) of each of `members` (parameters, by index), orthogonalised side by side.

    `columns` are those of one member; rank r holds the rows bounds[r] to bounds[r + 1] of each.
    """

    members: tuple[int, ...]
    start: int
    rows: int
    columns: int
    bounds: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stacked matrix."""
        return self.rows, self.columns * len(self.members)

    @property
    def is_cut(self) -> bool:
        return len(self.parts()) > 1

    def parts(self) -> list[tuple[int, int, int]]:
        """(rank, first row, row after the last) for each rank that holds some of it."""
        end = self.start + self.rows
        parts = [
            (rank, max(self.start, self.bounds[rank]), min(end, self.bounds[rank + 1]))
            for rank in range(len(self.bounds) - 1)
        ]
        return [(rank, first, last) for rank, first, last in parts if first < last]


@dataclass(frozen=True)
class Run:
    """`count` blocks of `rows` rows that follow one another, from row `start` of what this rank holds of `members`."""

    members: tuple[int, ...]
    start: int
    count: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.rows

    @property
    def shape(self) -> tuple[int, int]:
        """Of one stacked matrix."""
        return self.rows, self.columns * len(self.members)


def work(rows: int, columns: int) -> int:
    """Proportional to the multiplications: the smaller side squared times the larger."""
    return min(rows, columns) ** 2 * max(rows, columns)


def owners(blocks: list[Block], load: list[int]) -> list[int]:
    """The rank that orthogonalises each block; `load` is what each rank has to do besides, and grows."""
    chosen: dict[int, int] = {}
    cut = []
    for number, block in enumerate(blocks):
        holders = [rank for rank, _, _ in block.parts()]
        if len(holders) == 1:
            chosen[number] = holders[0]
            load[holders[0]] += work(*block.shape)
        else:
            cut.append(number)
    for number in sorted(cut, key=lambda number: (-work(*blocks[number].shape), number)):
        chosen[number] = min(range(len(load)), key=lambda rank: (load[rank], rank))
        load[chosen[number]] += work(*blocks[number].shape)
    return [chosen[number] for number in range(len(blocks))]


def join(blocks: Iterable[Block], rank: int) -> list[Run]:
    """Blocks that lie on `rank`, as runs: neighbours of equal height are one."""
    runs: list[Run] = []
    for block in blocks:
        new = Run(block.members, block.start - block.bounds[rank], 1, block.rows, block.columns)
        last = runs[-1] if runs else None
        if last and replace(new, start=last.start, count=last.count) == last and last.end == new.start:
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(new)
    return runs


def batches(runs: Iterable[Run], max_elements: int) -> Iterator[list[Run]]:
    """Runs of one stacked shape together, with at most `max_elements` (or one matrix) in a batch."""
    by_shape: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        by_shape[run.shape].append(run)
    for (rows, columns), same in by_shape.items():
        most = max(1, max_elements // (rows * columns))
        batch: list[Run] = []
        room = most
        for run in same:
            done = 0
            while done < run.count:
                part = replace(run, start=run.start + done * rows, count=min(room, run.count - done))
                batch.append(part)
                done, room = done + part.count, room - part.count
                if not room:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch


def portions(blocks: Iterable[Block], max_elements: int) -> Iterator[list[int]]:
    """Numbers of `blocks` in parts of at most `max_elements` (or one block)."""
    part: list[int] = []
    elements = 0
    for number, block in enumerate(blocks):
        size = math.prod(block.shape)
        if part and elements + size > max_elements:
            yield part
            part, elements = [], 0
        part.append(number)
        elements += size
    if part:
        yield part
