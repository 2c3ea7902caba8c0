"""The rows of each parameter that this rank updates, for unsharded parameters, sharded optimizer, FSDP2 and experts.

A rank always owns whole rows (indices of the first dimension) of a parameter, and momentum and moments of those rows
exist on that rank only. In a checkpoint they are DTensors, so that any number of ranks can load them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

# Below this many elements for each rank a collective of its own costs more than packing the rows with others.
PACKED_ELEMENTS = 2**16

# torch 2.13 renames it; 2.11 knows the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Share:
    """This rank's rows of one parameter.

    Args:
        parameter: a tensor that every rank holds in full, or a DTensor cut along its first dimension.
        share_over: mesh of one dimension whose ranks share the rows of a tensor that all of them hold; DTensors are
            cut already and stay as they are.

    Attributes:
        bounds: rank r of `group` has rows bounds[r] to bounds[r + 1]; one rank without group has all of them. None
            where several mesh dimensions cut the rows: then only what treats each row by itself can be done.

    Raises:
        ValueError: a DTensor that is cut along another dimension, or not yet summed.
    """

    def __init__(self, parameter: Tensor, share_over: DeviceMesh | None = None) -> None:
        self.parameter = parameter
        self.mesh: DeviceMesh | None = None
        self.placements: tuple[Placement, ...] = ()
        self.gathers = False
        if isinstance(parameter, DTensor):
            self.mesh, self.placements = parameter.device_mesh, parameter.placements
        elif share_over is not None and share_over.size() > 1 and parameter.dim():
            assert share_over.ndim == 1, "share_over has one dimension"
            self.mesh, self.placements, self.gathers = share_over, (Shard(0),), True
        cuts = [dim for dim, placement in enumerate(self.placements) if not placement.is_replicate()]
        for dim in cuts:
            if getattr(self.placements[dim], "dim", None) != 0:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has placement {self.placements[dim]}; the "
                    "optimizers take parameters that are whole or cut along their first dimension"
                )
        rows = parameter.shape[0] if parameter.dim() else 1
        self.group: dist.ProcessGroup | None = None
        self.rank = 0
        self.bounds: tuple[int, ...] | None = (0, rows)
        if self.mesh is not None and len(cuts) == 1:
            ranks = self.mesh.size(cuts[0])
            self.group, self.rank = self.mesh.get_group(cuts[0]), self.mesh.get_local_rank(cuts[0])
            part = -(-rows // ranks)  # as torch.chunk and FSDP2 cut: the last parts may be smaller, or empty
            self.bounds = tuple(min(rank * part, rows) for rank in range(ranks + 1))
        elif cuts:
            self.bounds = None

    @property
    def ranks(self) -> int:
        return 1 if self.bounds is None else len(self.bounds) - 1

    def part_sizes(self) -> list[int]:
        """Rows of each rank; none where `bounds` are not known."""
        return [last - first for first, last in pairwise(self.bounds or ())]

    def rows_of(self, rank: int) -> slice:
        """Those of one rank; only where `bounds` are known."""
        assert self.bounds is not None
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def _own(self, tensor: Tensor) -> Tensor:
        if self.gathers:
            return tensor[self.rows_of(self.rank)]
        return local(tensor)

    @property
    def weight(self) -> Tensor:
        """The rows, as a view: writing to it changes the parameter."""
        return self._own(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else self._own(self.parameter.grad)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """State for these rows, zero; a DTensor where other ranks have other rows."""
        state = torch.zeros_like(self.weight, dtype=dtype, memory_format=torch.contiguous_format)
        if self.mesh is None:
            return state
        shape = self.parameter.shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(state, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_weights(shares: Iterable[Share]) -> None:
    """Bring rows updated elsewhere into parameters that every rank holds in full; a collective of all ranks."""
    shares = [share for share in shares if share.gathers]
    works, packed = [], []
    for share in shares:
        parameter = share.parameter.detach()
        even = parameter.shape[0] % share.ranks == 0 and parameter.is_contiguous()
        if even and parameter.numel() >= PACKED_ELEMENTS * share.ranks:
            works.append(_all_gather(parameter, share.weight, group=share.group, async_op=True))
        else:
            packed.append(share)
    if packed:
        _gather_packed(packed)
    for work in works:
        work.wait()


def _gather_packed(shares: list[Share]) -> None:
    """Rows of many small parameters in one collective; parts of unequal size are padded to the first, the largest."""
    first = shares[0]
    sizes = [share.part_sizes()[0] * share.parameter[0].numel() for share in shares]
    mine = first.parameter.new_empty(sum(sizes))
    _copy_all(
        [slot[: share.weight.numel()] for share, slot in zip(shares, mine.split(sizes), strict=True)],
        [share.weight.reshape(-1) for share in shares],
    )
    everything = mine.new_empty(first.ranks * mine.numel())
    _all_gather(everything, mine, group=first.group)
    for rank, part in enumerate(everything.split(mine.numel())):
        rows = [share.parameter.detach()[share.rows_of(rank)] for share in shares]
        slots = [slot[: row.numel()].view_as(row) for row, slot in zip(rows, part.split(sizes), strict=True)]
        _copy_all(rows, slots)


def _copy_all(to: list[Tensor], source: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(to, source, strict=True) if a.numel()]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
