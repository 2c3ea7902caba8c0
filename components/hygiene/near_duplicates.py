"""Near-duplicates by MinHash (Broder 1997): a document that is almost an earlier one is left out.

Similarity is Jaccard's of the sets of runs of five words, as FineWeb's (Penedo et al. 2024, arXiv:2406.17557). Words
are those of contamination.py. Korean is written with spaces, so its words are eojeol with their particles; one that
changes takes five runs with it, as in English. Texts of fewer than five words have no run and are never left out here.

A signature has the minima of HASHES hash functions over the runs; the share of equal minima estimates the similarity,
with a standard error of at most 0.05. Signatures are cut into bands of equally many minima: only documents with an
equal band are compared (locality-sensitive hashing), in the manifest's order, with the first that has this band and
with the one before. A decision about a document rests on earlier ones alone, so it holds when text is appended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.hygiene.contamination import GramHasher, words
from components.hygiene.filters import DOCUMENT, INVISIBLE, Drop

WORDS, HASHES, SEED = 5, 112, 1
DTYPE = np.dtype([*DOCUMENT, ("signature", "<u4", (HASHES,))])
RECORDS = 2**21  # documents of a band compared at once
CHUNK = 2**14  # signatures read at once
AT_ONCE = 2**18  # runs of words hashed at once


class NearDuplicates:
    name = "near_duplicates"

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._rows = rows_for(threshold)

    @property
    def settings(self) -> dict[str, Any]:
        from rensa import RMinHash

        return {
            "threshold": self._threshold,
            "words": WORDS,
            "hashes": HASHES,
            "bands": HASHES // self._rows,
            "minhash": f"rensa R {RMinHash.ALGORITHM_VERSION}",
        } | INVISIBLE

    def scanner(self) -> _Scanner:
        return _Scanner()

    def decide(self, scans: Sequence[Path], files: Sequence[str]) -> Iterator[list[Drop]]:
        arrays = [np.load(path, mmap_mode="r") for path in scans]
        done = [np.zeros(len(array), bool) for array in arrays]
        ranges = max(-(-sum(map(len, arrays)) // RECORDS), 1)
        for first in range(0, HASHES, self._rows):
            for number in range(ranges):
                bounds = [n * 2**64 // ranges for n in (number, number + 1)]
                found = _band(arrays, slice(first, first + self._rows), *bounds)
                yield [self._drop(arrays, files, *pair) for pair in self._similar(arrays, done, found)]

    def _similar(
        self, arrays: list[NDArray[Any]], done: list[NDArray[np.bool_]], found: NDArray[Any]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], float]]:
        """Yield (document, an earlier one, their estimated similarity) of documents with an equal band."""
        equal = found["key"][1:] == found["key"][:-1]
        starts = np.flatnonzero(np.concatenate([[True], ~equal]))
        for at in (np.flatnonzero(equal) + 1).tolist():
            file, row = int(found["file"][at]), int(found["row"][at])
            if done[file][row]:
                continue
            first = int(starts[np.searchsorted(starts, at, side="right") - 1])
            mine = arrays[file][row]["signature"]
            for other in dict.fromkeys((first, at - 1)):
                known = int(found["file"][other]), int(found["row"][other])
                similarity = float(np.mean(arrays[known[0]][known[1]]["signature"] == mine))
                if similarity >= self._threshold:
                    done[file][row] = True
                    yield (file, row), known, similarity
                    break

    def _drop(
        self,
        arrays: list[NDArray[Any]],
        files: Sequence[str],
        this: tuple[int, int],
        known: tuple[int, int],
        similarity: float,
    ) -> Drop:
        record, same = arrays[this[0]][this[1]], arrays[known[0]][known[1]]
        evidence = {
            "same_as": {"file": files[known[0]], "document": int(same["document"])},
            "similarity": round(similarity, 3),
        }
        return Drop(this[0], int(record["document"]), int(record["offset"]), int(record["bytes"]), evidence)


class _Scanner:
    def __init__(self) -> None:
        from rensa import RMinHash

        self._minhash, self._hasher = RMinHash, GramHasher(WORDS)
        self._waiting, self._runs = list[NDArray[np.uint64]](), 0
        self._known = list[tuple[int, int, int]]()
        self._signatures = list[NDArray[np.uint32]]()

    def see(self, document: int, offset: int, text: str) -> None:
        runs = self._hasher(words(text))
        if not len(runs):
            return
        self._known.append((document, offset, len(text.encode())))
        self._waiting.append(runs)
        self._runs += len(runs)
        if self._runs > AT_ONCE:
            self._hash()

    def result(self) -> NDArray[Any]:
        self._hash()
        records = np.empty(len(self._known), DTYPE)
        for number, (name, *_) in enumerate(DOCUMENT):
            records[name] = [known[number] for known in self._known]
        if self._signatures:
            records["signature"] = np.concatenate(self._signatures)
        return records

    def _hash(self) -> None:
        if self._waiting:
            self._signatures.append(signatures(self._waiting))
        self._waiting, self._runs = [], 0


def signatures(runs: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint32]:
    """[documents, HASHES], the signatures of documents by the hashes of their runs of words."""
    from rensa import RMinHash

    ends = np.cumsum([0, *map(len, runs)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(runs), ends, HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def rows_for(threshold: float) -> int:
    """Minima of a band: the most with which a pair at the threshold is compared with a probability of 90% or more."""
    fitting = [r for r in range(1, HASHES + 1) if HASHES % r == 0]
    return max((r for r in fitting if 1 - (1 - threshold**r) ** (HASHES // r) >= 0.9), default=1)


def _band(arrays: list[NDArray[Any]], band: slice, low: int, high: int) -> NDArray[Any]:
    """(key, file, row) of the documents whose band's key lies in [low, high), by key and then in the manifest's
    order."""
    pieces = [np.empty(0, [("key", "<u8"), ("file", "<u4"), ("row", "<u4")])]
    for file, array in enumerate(arrays):
        for first in range(0, len(array), CHUNK):
            part = np.ascontiguousarray(array["signature"][first : first + CHUNK, band])
            keys = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in part), np.uint64, len(part))
            inside = np.flatnonzero((keys >= np.uint64(low)) & (keys <= np.uint64(high - 1)))
            piece = np.empty(len(inside), pieces[0].dtype)
            piece["key"], piece["file"], piece["row"] = keys[inside], file, first + inside
            pieces.append(piece)
    found = np.concatenate(pieces)
    return found[np.argsort(found["key"], kind="stable")]
