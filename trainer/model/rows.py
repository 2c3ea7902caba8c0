"""The rows of a tensor on this rank, for any kind of sharding; all sharding is along dimension 0."""

from __future__ import annotations

from torch import Tensor


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor, sharing its memory, and the part's first row in the whole tensor."""
    if not hasattr(tensor, "placements"):  # no DTensor; asked so, because importing that class takes seconds
        return tensor, 0
    first, rows = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"{placement} is not a split along dimension 0"
        part = -(-rows // tensor.device_mesh.size(dim))  # as torch.chunk cuts: the last parts are smaller or empty
        start = min(rows, part * tensor.device_mesh.get_local_rank(dim))
        first, rows = first + start, min(part, rows - start)
    own = tensor.to_local()
    assert own.shape[0] == rows, (own.shape, tensor.shape)
    return own, first
