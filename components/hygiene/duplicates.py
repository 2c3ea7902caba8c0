"""Exact duplicates: of documents with the same text, the first in the manifest's order is kept.

Texts are compared by their 128-bit hash, without invisible characters, after Unicode composition (NFC), with every run
of white space replaced by one space.
Memory does not grow with the corpus: each file's hashes are sorted, and one range of hashes after another is read from
all files.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.hygiene.filters import DOCUMENT, INVISIBLE, Drop, visible

DTYPE = np.dtype([*DOCUMENT, ("high", "<u8"), ("low", "<u8")])
RECORDS = 2**21  # documents compared at once: about 200 MB


class ExactDuplicates:
    name = "exact_duplicates"
    settings = {"normalisation": "NFC, white space", "hash": "xxh3_128"} | INVISIBLE

    def scanner(self) -> _Scanner:
        return _Scanner()

    def decide(self, scans: Sequence[Path], files: Sequence[str]) -> Iterator[list[Drop]]:
        arrays = [np.load(path, mmap_mode="r") for path in scans]
        ranges = -(-sum(map(len, arrays)) // RECORDS)
        for number in range(ranges):
            bounds = [n * 2**64 // ranges for n in (number, number + 1)]
            parts = [_within(array, *bounds) for array in arrays]
            numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            yield [
                Drop(file, int(again["document"]), int(again["offset"]), int(again["bytes"]), _evidence(files, first))
                for file, again, first in _repeated(np.concatenate(parts), numbers)
            ]


class _Scanner:
    def __init__(self) -> None:
        self._fields = array("Q")  # five per document: 40 bytes; a list of tuples takes 250

    def see(self, document: int, offset: int, text: str) -> None:
        key = xxhash.xxh3_128_intdigest(normalised(text).encode())
        self._fields.extend((document, offset, len(text.encode()), key >> 64, key & (2**64 - 1)))

    def result(self) -> NDArray[Any]:
        fields = np.frombuffer(self._fields, np.uint64).reshape(-1, 5)
        records = np.empty(len(fields), DTYPE)
        for number, name in enumerate(DTYPE.names or ()):
            records[name] = fields[:, number]
        return records[np.lexsort((records["document"], records["low"], records["high"]))]


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", visible(text)).split())


def _within(array: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    """The records whose high half lies in [low, high)."""
    first = np.searchsorted(array["high"], np.uint64(low))
    last = np.searchsorted(array["high"], np.uint64(high)) if high < 2**64 else len(array)
    return np.array(array[first:last])


def _repeated(records: NDArray[Any], numbers: NDArray[np.int64]) -> Iterator[tuple[int, Any, tuple[int, int]]]:
    """Yield (file, record, (file, document) of the group's first) for all but the first of each group of equal
    hashes."""
    order = np.lexsort((records["document"], numbers, records["low"], records["high"]))
    records, numbers = records[order], numbers[order]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    for at in (np.flatnonzero(same) + 1).tolist():
        first = starts[np.searchsorted(starts, at, side="right") - 1]
        yield int(numbers[at]), records[at], (int(numbers[first]), int(records["document"][first]))


def _evidence(files: Sequence[str], first: tuple[int, int]) -> dict[str, Any]:
    return {"same_as": {"file": files[first[0]], "document": first[1]}}
