"""The origin of each document of a shard: `PREFIX.docs` beside `PREFIX.bin` and `PREFIX.idx`. Imports no torch.

    offset     bytes  content
    0          8      magic "YAODOCS1"
    8          4      u32 n, bytes of the table of files
    12         n      JSON list of strings: raw files, relative to the raw stage's directory
    12 + n     12·S   for each document, in the order of the index: u32 number of its file in the table,
                      u64 byte offset at which its line starts there

Little-endian. Megatron's readers ignore the file; the manifest has its checksum.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.sidecar import beside, explained
from trainer.files import sync_directory

MAGIC = b"YAODOCS1"
TABLE_BYTES = struct.Struct("<I")
RECORD = np.dtype([("file", "<u4"), ("offset", "<u8")])
SUFFIX = ".docs"


@dataclass(frozen=True)
class Origin:
    """The raw line of a document; the file's path is relative to the raw stage's directory, `offset` is in bytes."""

    path: str
    offset: int


class OriginsWriter:
    """Writes one `.docs`; the final name appears only at `close`.

    Args:
        prefix: prefix of the shard.
        files: the table; `append` refers to it by number.
    """

    def __init__(self, prefix: str | Path, files: Sequence[str]) -> None:
        self._path = beside(prefix, SUFFIX)
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close
        table = json.dumps(list(files), ensure_ascii=False).encode()
        self._file.write(MAGIC + TABLE_BYTES.pack(len(table)) + table)

    def append(self, file: int, offsets: NDArray[np.integer]) -> None:
        """Add documents of one raw file."""
        records = np.empty(len(offsets), RECORD)
        records["file"], records["offset"] = file, offsets
        self._file.write(records.data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_directory(self._path.parent)


class Origins:
    """One `.docs`, mapped read-only: `origins[i]` is the origin of document i of the shard.

    Raises:
        DataError: the file is missing, malformed, or not for a shard of `documents` documents.
    """

    def __init__(self, prefix: str | Path, documents: int) -> None:
        path = beside(prefix, SUFFIX)
        with explained(path):
            data = np.memmap(path, mode="r", dtype=np.uint8)
            if bytes(data[: len(MAGIC)]) != MAGIC:
                raise ValueError("no list of origins")
            at = len(MAGIC) + TABLE_BYTES.size
            records = at + TABLE_BYTES.unpack(bytes(data[len(MAGIC) : at]))[0]
            self.files: list[str] = json.loads(bytes(data[at:records]))
            if len(data) != (expected := records + documents * RECORD.itemsize):
                raise ValueError(f"has {len(data)} bytes, {documents} documents need {expected}")
            self._records = np.frombuffer(data, RECORD, documents, records)
            if documents and int(self._records["file"].max()) >= len(self.files):
                raise ValueError("names files that are not in its table")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Origin:
        file, offset = self._records[index].item()
        return Origin(self.files[file], offset)
