"""Token files in Megatron's indexed format, byte for byte, so that other tools open ours. Imports no torch.

`PREFIX.bin` is the tokens of all sequences back to back. `PREFIX.idx`, little-endian, unaligned after its header:

    offset     bytes  content
    0          9      magic "MMIDIDX\\0\\0"
    9          8      u64 version = 1
    17         1      u8 dtype code: 4 = int32, 8 = uint16 (the other codes are no token types)
    18         8      u64 S, number of sequences
    26         8      u64 D, length of the document index = documents + 1
    34         4·S    i32 tokens of each sequence
    34 + 4·S   8·S    i64 byte offset of each sequence in .bin
    34 + 12·S  8·D    i64 document index: numbers of the sequences at which documents start, and S at the end

Here a document is always exactly one sequence, so D = S + 1 and the document index counts up. Megatron's reader checks
almost nothing; ours checks the sizes when it opens a pair, and every offset then or in `Shard.check`, so that truncated
files are detected.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.files import sync_directory

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 2**17  # sequences processed at once while an index is completed or checked
QUICK = 2**20  # indices of up to this many sequences are checked at every open


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest token type that holds ids 0 … vocab_size - 1."""
    return np.dtype("<u2") if vocab_size - 1 <= np.iinfo("<u2").max else np.dtype("<i4")


class ShardWriter:
    """Writes one pair with bounded memory. The final names appear only at `close`.

    As a context manager it closes on success and removes the temporary files on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"{self.prefix}: token type {self.dtype} cannot be written; use uint16 or int32")
        self.sequences = 0
        self.tokens = 0
        self._bin: BinaryIO = open(_temporary(self.prefix, "bin"), "wb")  # noqa: SIM115 - closed by close or abort
        self._idx: BinaryIO = open(_temporary(self.prefix, "idx"), "w+b")  # noqa: SIM115
        self._idx.write(bytes(HEADER.size))

    @property
    def bytes(self) -> int:
        """Bytes of .bin so far."""
        return self.tokens * self.dtype.itemsize

    def append(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Add documents: their concatenated tokens, and the number of tokens of each."""
        assert tokens.dtype == self.dtype and int(lengths.sum()) == len(tokens)
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._idx.write(lengths.astype("<i4").data)
        self.sequences += len(lengths)
        self.tokens += len(tokens)

    def close(self) -> None:
        """Complete the index from the lengths already in it, fsync both files, and rename them."""
        end = self._idx.tell()
        offset = 0
        for first in range(0, self.sequences, BLOCK):
            self._idx.seek(HEADER.size + 4 * first)
            lengths = np.frombuffer(self._idx.read(4 * min(BLOCK, self.sequences - first)), "<i4")
            ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            self._idx.seek(end + 8 * first)
            self._idx.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").data)
            offset = int(ends[-1])
        self._idx.seek(end + 8 * self.sequences)
        for first in range(0, self.sequences + 1, BLOCK):
            self._idx.write(np.arange(first, min(first + BLOCK, self.sequences + 1), dtype="<i8").data)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.sequences + 1))
        for file, suffix in ((self._bin, "bin"), (self._idx, "idx")):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(_temporary(self.prefix, suffix), _named(self.prefix, suffix))
        sync_directory(self.prefix.parent)

    def abort(self) -> None:
        for file, suffix in ((self._bin, "bin"), (self._idx, "idx")):
            file.close()
            _temporary(self.prefix, suffix).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Shard:
    """One pair, mapped read-only: `lengths` (tokens of each document) and `document(i, start, stop)`.

    Raises:
        DataError: a file is missing, or header, sizes and offsets are inconsistent.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        idx, bin_ = _named(self.prefix, "idx"), _named(self.prefix, "bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise DataError(f"{path}: missing; run the shards step again")
        idx_bytes, bin_bytes = idx.stat().st_size, bin_.stat().st_size
        if idx_bytes < HEADER.size:
            raise DataError(f"{idx}: {idx_bytes} bytes are too short for an index; run the shards step again")
        with open(idx, "rb") as file:
            magic, version, code, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise DataError(f"{idx}: not a Megatron index of version {VERSION}; run the shards step again")
        if code not in DTYPES:
            raise DataError(
                f"{idx}: token type code {code} is neither uint16 (8) nor int32 (4); run the shards step again"
            )
        self.dtype = DTYPES[code]
        if boundaries != sequences + 1:
            raise DataError(f"{idx}: {sequences} sequences in {boundaries - 1} documents; one a document is expected")
        if idx_bytes != (expected := HEADER.size + 12 * sequences + 8 * boundaries):
            raise DataError(f"{idx}: has {idx_bytes} bytes, its header says {expected}; run the shards step again")
        index = np.memmap(idx, mode="r", dtype=np.uint8)
        at = HEADER.size
        self.lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, at)
        self._offsets: NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self._documents: NDArray[np.int64] = np.frombuffer(index, "<i8", boundaries, at + 12 * sequences)
        expected = int(self._offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if bin_bytes != expected:
            raise DataError(f"{bin_}: has {bin_bytes} bytes, its index says {expected}; run the shards step again")
        self.num_tokens = bin_bytes // self.dtype.itemsize
        # As a plain array: slices of a memmap cost several times more.
        mapped = np.memmap(bin_, mode="r", dtype=self.dtype) if bin_bytes else np.empty(0, self.dtype)
        self._tokens: NDArray[np.integer] = mapped.view(np.ndarray)
        if sequences <= QUICK:
            self.check()

    def check(self) -> None:
        """Check that the three arrays of the index agree; takes seconds for tens of millions of documents.

        Raises:
            DataError: they do not agree.
        """
        idx, total = _named(self.prefix, "idx"), 0
        for first in range(0, len(self), BLOCK):
            block = slice(first, first + BLOCK)
            lengths = self.lengths[block]
            ends = total + np.cumsum(lengths, dtype=np.int64)
            numbers = np.arange(first, first + len(lengths))
            sound = (
                (lengths > 0).all()
                and np.array_equal(self._offsets[block], (ends - lengths) * self.dtype.itemsize)
                and np.array_equal(self._documents[first : first + len(lengths)], numbers)
            )
            if not sound:
                raise DataError(
                    f"{idx}: lengths, offsets and documents do not fit each other; run the shards step again"
                )
            total = int(ends[-1])
        if self._documents[-1] != len(self):
            raise DataError(f"{idx}: the document index does not end at {len(self)}; run the shards step again")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document, as a view of the mapped file."""
        first = int(self._offsets[index]) // self.dtype.itemsize
        length = int(self.lengths[index])
        return self._tokens[first + start : first + (length if stop is None else min(stop, length))]


def _named(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _temporary(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}.tmp")
