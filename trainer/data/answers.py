"""The answers of each document of a shard, for training on answers only: `PREFIX.answers` beside `PREFIX.bin`.

    offset          bytes      content
    0               8          magic "YAOANSW1"
    8               8          u64 n, number of answers
    16              8·(S+1)    u64 number of the first answer of each of S documents, in the order of the index, and n
    24 + 8·S        8·n        for each answer, u32 start and u32 stop: tokens [start, stop) of its document

Little-endian; the answers of a document are in ascending order and do not overlap. Only sources with `loss: answers`
have the file. Megatron's readers ignore it; the manifest has its checksum. Imports no torch.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.sidecar import beside, damaged, explained
from trainer.files import atomic_write

MAGIC = b"YAOANSW1"
HEADER = struct.Struct("<8sQ")
SUFFIX = ".answers"
Ranges = NDArray[np.uint32]  # [n, 2], start and stop of each answer


def write_answers(prefix: str | Path, counts: NDArray[np.integer], ranges: Ranges) -> None:
    """Write the answers of a shard: their number in each document, and the concatenated ranges."""
    assert int(counts.sum()) == len(ranges)
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype("<u8")
    data = HEADER.pack(MAGIC, len(ranges)) + firsts.tobytes() + ranges.astype("<u4").tobytes()
    atomic_write(beside(prefix, SUFFIX), data)


class Answers:
    """One `.answers` file, mapped read-only: `answers[i]` are the ranges of document i of the shard.

    Raises:
        DataError: the file is missing, malformed, or not for a shard of `documents` documents.
    """

    def __init__(self, prefix: str | Path, documents: int) -> None:
        self._path = path = beside(prefix, SUFFIX)
        with explained(path):
            data = np.memmap(path, mode="r", dtype=np.uint8)
            magic, count = HEADER.unpack(bytes(data[: HEADER.size]))
            if magic != MAGIC:
                raise ValueError("not a list of answers")
            at = HEADER.size + 8 * (documents + 1)
            if len(data) != (expected := at + 8 * count):
                raise ValueError(f"{len(data)} bytes, but {documents} documents with {count} answers need {expected}")
            self._firsts: NDArray[np.uint64] = np.frombuffer(data, "<u8", documents + 1, HEADER.size)
            self._ranges: Ranges = np.frombuffer(data, "<u4", 2 * count, at).reshape(count, 2)

    def check(self, lengths: NDArray[np.integer]) -> None:
        """Check that the answers are in order and inside their documents, whose numbers of tokens are `lengths`.

        Raises:
            DataError: they are not.
        """
        firsts, (starts, stops) = self._firsts.astype(np.int64), self._ranges.astype(np.int64).T
        if firsts[0] != 0 or firsts[-1] != len(starts) or (np.diff(firsts) < 0).any():
            raise damaged(self._path, "the index of first answers does not ascend to the number of answers")
        document = np.repeat(np.arange(len(lengths)), np.diff(firsts))
        follows = document[1:] == document[:-1]
        if (starts >= stops).any() or (stops > lengths[document]).any() or (starts[1:] < stops[:-1])[follows].any():
            raise damaged(self._path, "answers are empty, overlap, or reach beyond their document")

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, document: int) -> Ranges:
        return self._ranges[int(self._firsts[document]) : int(self._firsts[document + 1])]


def trained(ranges: Ranges, start: int, stop: int) -> NDArray[np.bool_]:
    """For each of a document's tokens [start, stop), whether it is in one of the ranges."""
    mask = np.zeros(stop - start, np.bool_)
    for first, last in ranges.tolist():
        mask[max(first - start, 0) : max(last - start, 0)] = True
    return mask


def count_trained(ranges: Ranges, start: int, stop: int) -> int:
    """The number of a document's tokens [start, stop) that are in one of the ranges."""
    return sum(max(min(last, stop) - max(first, start), 0) for first, last in ranges.tolist())
