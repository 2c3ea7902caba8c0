"""Gather blocks that are split between ranks on their owner, and scatter them back: one all-to-all each way.

Both are started here and awaited by the caller, who has other blocks to work on meanwhile.

Shape suffixes: N matrices, m rows, k columns (of a whole stack), K members of a stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.division import Block


@dataclass(frozen=True)
class Piece:
    """Some rows of one member of one block, which rank `holder` has and rank `owner` orthogonalises.

    Attributes:
        block: number of the block; parameter: index of the member.
        first, last: rows [first, last) in what the holder has; top, left: where they belong in the stacked matrix.
    """

    block: int
    parameter: int
    first: int
    last: int
    columns: int
    top: int
    left: int
    holder: int
    owner: int

    @property
    def place(self) -> int:
        """Number of the member in its block."""
        return self.left // self.columns

    @property
    def elements(self) -> int:
        return (self.last - self.first) * self.columns

    def of(self, x_mk: Tensor) -> Tensor:
        """Its part of the stacked matrix."""
        return x_mk[self.top : self.top + self.last - self.first, self.left : self.left + self.columns]


def _pieces(number: int, block: Block, owner: int) -> list[Piece]:
    return [
        Piece(
            block=number,
            parameter=parameter,
            first=first - block.bounds[holder],
            last=last - block.bounds[holder],
            columns=block.columns,
            top=first - block.start,
            left=place * block.columns,
            holder=holder,
            owner=owner,
        )
        for place, parameter in enumerate(block.members)
        for holder, first, last in block.parts()
    ]


class Exchange:
    """The traffic of some blocks in one process group; every rank makes it from equal arguments but its own rank.

    Attributes:
        blocks: all of them, as the pieces number them; held: the pieces that lie on this rank.
    """

    def __init__(self, blocks: list[tuple[Block, int]], rank: int, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, dist.get_world_size(group)
        self.blocks = [block for block, _ in blocks]
        self._shapes = {number: block.shape for number, (block, owner) in enumerate(blocks) if owner == rank}
        pieces = [piece for number, (block, owner) in enumerate(blocks) for piece in _pieces(number, block, owner)]
        # Sorting is stable, so two ranks list the rows they exchange in the same order.
        self.held = sorted((piece for piece in pieces if piece.holder == rank), key=lambda piece: piece.owner)
        self._owned = sorted((piece for piece in pieces if piece.owner == rank), key=lambda piece: piece.holder)
        self._index: tuple[Tensor, Tensor] | None = None

    def largest(self, sizes: list[Tensor], like: Tensor) -> Tensor:
        """[2, K, N]: the largest `sizes` of each member of each block over all ranks; those of `held` are [2, 1].

        The result has the dtype and the device of `like`. A collective of the group.
        """
        sizes_2KN = like.new_zeros(2, max(len(block.members) for block in self.blocks), len(self.blocks))
        if self.held:
            sizes_2KN[:, *self._places(like.device)] = torch.cat(sizes, dim=1)
        dist.all_reduce(sizes_2KN, dist.ReduceOp.MAX, group=self._group)
        return sizes_2KN

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places and blocks of `held`, made once: from a list they would be copied to the device, which waits."""
        if self._index is None or self._index[0].device != device:
            places, blocks = [piece.place for piece in self.held], [piece.block for piece in self.held]
            self._index = torch.tensor(places, device=device), torch.tensor(blocks, device=device)
        return self._index

    def to_owners(self, rows: list[Tensor], like: Tensor) -> Trip:
        """Send rows of `held` to their owners.

        All tensors here have the dtype and the device of `like`. A collective of the group, as is `to_holders`.
        """
        return self._move(rows, self._owned, like, to_owners=True)

    def matrices(self, received: list[Tensor], like: Tensor, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply `work` to the matrices [N, m, k] that this rank owns and whose rows it has received; what to send back
        of the results."""
        numbers: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, shape in self._shapes.items():
            numbers[shape].append(number)
        matrices: dict[int, Tensor] = {}
        stacked = {shape: like.new_empty(len(same), *shape) for shape, same in numbers.items()}
        for shape, same in numbers.items():
            matrices |= dict(zip(same, stacked[shape], strict=True))
        for piece, row in zip(self._owned, received, strict=True):
            piece.of(matrices[piece.block]).copy_(row)
        for shape, same in numbers.items():
            matrices |= dict(zip(same, work(stacked[shape]), strict=True))
        return [piece.of(matrices[piece.block]) for piece in self._owned]

    def to_holders(self, rows: list[Tensor], like: Tensor) -> Trip:
        """Send the results of `matrices` back; they arrive as rows of `held`."""
        return self._move(rows, self.held, like, to_owners=False)

    def _move(self, rows: list[Tensor], incoming: list[Piece], like: Tensor, *, to_owners: bool) -> Trip:
        outgoing = self.held if to_owners else self._owned
        sent, received = [0] * self._ranks, [0] * self._ranks
        for piece in outgoing:
            sent[piece.owner if to_owners else piece.holder] += piece.elements
        for piece in incoming:
            received[piece.holder if to_owners else piece.owner] += piece.elements
        out, buffer = like.new_empty(sum(sent)), like.new_empty(sum(received))
        if rows:
            torch.cat([row.reshape(-1) for row in rows], out=out)
        work = dist.all_to_all_single(buffer, out, received, sent, group=self._group, async_op=True)
        parts = buffer.split([piece.elements for piece in incoming])
        return Trip(work, out, [part.view(-1, piece.columns) for part, piece in zip(parts, incoming, strict=True)])


@dataclass(frozen=True)
class Trip:
    """Rows on their way; `sent` is kept until they have arrived."""

    work: dist.Work
    sent: Tensor
    rows: list[Tensor]

    def arrived(self) -> list[Tensor]:
        """The rows; on a GPU the stream waits for them, the host does not."""
        self.work.wait()
        return self.rows
