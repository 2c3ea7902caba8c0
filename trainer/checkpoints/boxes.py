"""Tensors of DCP files box by box, in one process without a process group, for models that do not fit into memory.

A box is a part of a tensor that is contiguous in every dimension. `write` computes each box when it is its turn to be
written; `Boxes.read` reads any box of a tensor, from however many files it is spread over.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.checkpoints.index import INDEX, Reader
from trainer.errors import CheckpointError, VolumeError, in_words

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """`shape` elements of tensor `key` from `offset` on; `size` is the shape of the whole tensor."""

    key: str
    size: Shape
    offset: Shape
    shape: Shape


def whole(key: str, size: Sequence[int]) -> Box:
    return Box(key, tuple(size), (0,) * len(size), tuple(size))


def write(
    folder: Path,
    boxes: Sequence[Box],
    dtype: Callable[[str], torch.dtype],
    compute: Callable[[Box], Tensor],
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write tensors into `folder`, in the order of `boxes`, which must fill each of them.

    Args:
        dtype: by key.
        compute: the content of a box; at most two of them are in memory.
        others: content by key that is not a tensor.

    Raises:
        VolumeError: they cannot be written.
    """
    planner = _WritePlanner(boxes, dtype, compute, others or {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that is what no_dist says
        try:
            dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            # torch.save raises RuntimeError on a full disk, with the place in its source
            if not (isinstance(cause, OSError) or "inline_container" in str(cause)):
                raise cause from None
            raise VolumeError(f"{folder}: cannot be written ({in_words(str(cause))}); free some space") from None


class _WritePlanner(dcp.DefaultSavePlanner):
    def __init__(
        self,
        boxes: Sequence[Box],
        dtype: Callable[[str], torch.dtype],
        compute: Callable[[Box], Tensor],
        others: Mapping[str, bytes],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = {MetadataIndex(box.key, box.offset): box for box in boxes}
        self._dtype, self._compute, self._others = dtype, compute, others

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, box in self._boxes.items():
            chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
            data = TensorWriteData(chunk, TensorProperties(dtype=self._dtype(box.key)), torch.Size(box.size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._others]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # Not DCP's, which compares each box of a tensor with each other: minutes, of thousands of experts.
        return create_default_global_save_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._others[write_item.index.fqn])
        box = self._boxes[write_item.index]
        values = self._compute(box).to(self._dtype(box.key))
        assert values.shape == box.shape, (box, values.shape)
        return values.contiguous()


class Boxes:
    """The tensors of a folder of DCP files.

    Args:
        foreign: written by another program than this.

    Raises:
        CheckpointError: the index cannot be read, or files are missing or cut.
    """

    def __init__(self, folder: Path, *, foreign: bool = False) -> None:
        self.folder = folder
        self._reader = Reader(folder, foreign=foreign)
        self._by_place: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._index = self._read_index()
        found = self._index.state_dict_metadata
        self.shapes: dict[str, Shape] = {
            key: tuple(entry.size) for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._check_files()
        self._reader.set_up_storage_reader(self._index, True)

    def read(self, box: Box, target: Tensor) -> None:
        """Read a box into `target` of its shape, converting to the target's dtype.

        Raises:
            CheckpointError: a part of it is nowhere, or a file is damaged.
        """
        entry = self._index.state_dict_metadata[box.key]
        assert isinstance(entry, TensorStorageMetadata) and tuple(entry.size) == box.size, (box, entry)
        wanted = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        near = replace(entry, chunks=self._near(box, entry))
        items = create_read_items_for_chunk_list(box.key, near, [wanted])
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise CheckpointError(f"{self.folder}: {box.key} is not complete; copy or save the checkpoint again")
        try:
            self._reader.read_data(LoadPlan(items), _Filler(target)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, AssertionError, UnpicklingError, KeyError) as error:
            said = in_words(" ".join(str(error).split())[:200] or type(error).__name__)
            raise CheckpointError(
                f"{self.folder}: {box.key} cannot be read ({said}); copy or save the checkpoint again"
            ) from None

    def _near(self, box: Box, entry: TensorStorageMetadata) -> list[ChunkStorageMetadata]:
        """The stored boxes in the same row of a tensor's first dimension, as DCP compares with all that it is given."""
        if box.shape[0] != 1 or len(box.shape) < 2:
            return entry.chunks
        if box.key not in self._by_place:
            by_place = self._by_place[box.key] = defaultdict(list)
            for chunk in entry.chunks:
                for first in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    by_place[first].append(chunk)
        return self._by_place[box.key][box.offset[0]]

    def _read_index(self) -> Metadata:
        path = self.folder / INDEX
        try:
            found = self._reader.read_metadata()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); name a checkpoint that was written to its end"
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # pickle raises nearly everything on bytes that are not a pickle
            raise CheckpointError(f"{path}: is not an index of a checkpoint ({type(error).__name__})") from None
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(f"{path}: is not an index of a checkpoint")
        return found

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._index.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if file.parent != self.folder or not file.is_file():
                raise CheckpointError(f"{file}: missing, but the index names it; copy or save the checkpoint again")
            if (size := file.stat().st_size) < end:
                raise CheckpointError(
                    f"{file}: has {size:,} bytes, the index needs {end:,}; copy or save the checkpoint again"
                )


class _Filler(LoadPlanner):
    """Puts each item where it belongs in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dimension, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The values are in place."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError("plans are made by Boxes")

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("plans are made by Boxes")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError("plans are made by Boxes")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError("plans are made by Boxes")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are read")
