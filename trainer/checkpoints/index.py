"""The index of files of torch.distributed.checkpoint (DCP), which DCP pickles, read without running what is pickled.

Our own index contains the few classes of `_INDEX_CLASSES`, and anything else is refused. An index of Megatron-LM
contains classes of megatron-core too; whatever is not in the list is replaced there by an object that does nothing.
DCP reads the tensors themselves with weights_only.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata

from trainer.errors import CheckpointError

INDEX = ".metadata"
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_INDEX_CLASSES = {
    "torch": _DTYPES | {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class Reader(dcp.FileSystemReader):
    """
    Args:
        foreign: the index was written by another program.
    """

    def __init__(self, path: str | Path, *, foreign: bool = False) -> None:
        super().__init__(path)
        self._unpickler = ForeignUnpickler if foreign else IndexUnpickler

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as stream:
            metadata: Metadata = self._unpickler(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """The tensors of one of our checkpoints."""
    index = Reader(path).read_metadata()
    return {k: entry.size for k, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}


class IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _INDEX_CLASSES.get(module, ()):
            raise _not_an_index(f"{module}.{name}")
        return super().find_class(module, name)


class ForeignUnpickler(IndexUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) == ("builtins", "getattr") or name in _INDEX_CLASSES.get(module, ())
        return super().find_class(module, name) if known else _Inert


class _Inert:
    """Stands for an object of a class that is not loaded: it can be made and filled, and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        pass

    def extend(self, _values: Any) -> None:
        pass

    add = append


def _memory_format(of: Any, name: str) -> Any:
    """Replaces getattr, as which Python before 3.11.4 pickles an enum member; only for this one enum."""
    if of is _Inert:  # an enum of another program
        return _Inert()
    if of is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise _not_an_index(f"{of}.{name}")
    return _MEM_FORMAT_ENCODING[name]


def _not_an_index(found: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's index names {found}, which no index contains; not loaded")
