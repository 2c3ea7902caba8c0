"""The order of one source's documents: an endless sequence of epochs, each a fresh pseudo-random permutation.

The permutation of a small source is drawn and kept. That of a large one is computed on demand: document number i of
an epoch is a keyed Feistel cipher of i (over the next power of two, with cycle walking; Black & Rogaway 2002,
"Ciphers with arbitrary finite domains"). It needs neither memory nor sorting, so a loader over any number of
documents starts at once on every rank. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Increase it with every change of the order. Version 3 draws nothing from a source that a curriculum stage leaves out;
# version 2 still paid its deficit. Until such a stage begins both give the same order, which is called 2.
ORDER_VERSION = 3
DEBTS_PAID_VERSION = 2
READ_AHEAD = 4096  # documents whose numbers and lengths are computed at once
SEEK_BLOCK = 2**16  # the same for a position lookup; fits a core's cache
KEPT = 2**16  # up to this many documents the permutation is kept; a cipher of few bits is also a poor shuffle
ROUNDS = 8  # even, so that halves of unequal width end in their original places
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # odd, from an integer hash with low bias (Wellons 2018, "lowbias32")


class Permutation:
    """A permutation of 0 … size-1, at most 2**32, that depends only on `key` (32 bytes)."""

    def __init__(self, size: int, key: bytes) -> None:
        assert size <= 2**32 and len(key) == 4 * ROUNDS
        self.size = size
        self._kept: NDArray[np.int64] | None = None
        if size <= KEPT:
            # NumPy guarantees PCG64's raw stream, but not `permutation`.
            raw = np.random.PCG64(int.from_bytes(key[:16], "little")).random_raw(size)
            self._kept = np.argsort(raw, kind="stable")
            return
        bits = (size - 1).bit_length()
        self._widths = (bits // 2, bits - bits // 2)  # of the upper and the lower half
        self._keys = np.frombuffer(key, "<u4").astype(np.uint32)

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        """The images of start … stop-1."""
        if self._kept is not None:
            return self._kept[start:stop]
        values = self._cipher(np.arange(start, stop, dtype=np.uint32))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._cipher(values[outside])
        return values.astype(np.int64)

    def _cipher(self, x: NDArray[np.uint32]) -> NDArray[np.uint32]:
        upper, lower = self._widths
        left, right = x >> np.uint32(lower), x & np.uint32((1 << lower) - 1)
        left_bits = upper
        for key in self._keys:
            mixed = right + key
            for multiplier in _MULTIPLIERS:
                mixed ^= mixed >> np.uint32(15)
                mixed *= np.uint32(multiplier)
            mixed >>= np.uint32(32 - left_bits)  # the upper bits of a product are well mixed
            mixed ^= left
            left, right = right, mixed
            left_bits = upper + lower - left_bits
        return (left << np.uint32(lower)) | right


class InTurn:
    """Concatenated permutations of consecutive ranges of documents: maps a position to a document number."""

    def __init__(self, permutations: Sequence[Permutation | Sorted]) -> None:
        self._permutations = permutations
        self._ends = np.cumsum([permutation.size for permutation in permutations]).tolist()
        self.size: int = self._ends[-1]

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        pieces = []
        for permutation, end in zip(self._permutations, self._ends, strict=True):
            first = end - permutation.size
            if start < end and stop > first:
                pieces.append(permutation(max(start - first, 0), min(stop, end) - first) + first)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def bands_of(scores: NDArray[np.number], bands: int | None) -> NDArray[np.integer]:
    """The band of each document: of `bands` groups of equally many by score or, if None, the rank of its score.

    At the edge of a band documents of equal scores are divided by their numbers.
    """
    if bands is None:
        ranks: NDArray[np.int64] = np.unique(scores, return_inverse=True)[1].reshape(-1)
        return ranks
    size = len(scores)
    # NumPy sorts 16-bit numbers by radix, which is what makes every epoch's start quick.
    band: NDArray[np.integer] = np.empty(size, np.uint16 if bands <= 2**16 else np.int64)
    band[np.argsort(scores, kind="stable")] = np.arange(size) * bands // max(size, 1)
    return band


class Sorted:
    """A permutation whose images are sorted by their bands; within one the order is that of the permutation."""

    def __init__(self, permutation: Permutation, band: NDArray[np.integer]) -> None:
        self.size = permutation.size
        images = permutation(0, self.size)
        self._images = images[np.argsort(band[images], kind="stable")]

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        return self._images[start:stop]


class SourceOrder:
    """The endless sequence of one source's documents: one permutation an epoch.

    An epoch of a grown source goes through its generations in order, so the first epoch begins as it did before the
    growth.

    Args:
        lengths: tokens of each document, in the shards' order.
        sizes: documents of each generation of the shards, oldest first; None: there is only one.
        scores: a score of each document, by which each generation is sorted in ascending order; None: not at all.
        bands: as `bands_of`.
    """

    def __init__(
        self,
        name: str,
        lengths: NDArray[np.integer],
        seed: int,
        sizes: Sequence[int] | None = None,
        scores: NDArray[np.number] | None = None,
        bands: int | None = None,
    ) -> None:
        self.name = name
        self.lengths = lengths
        self._sizes = [len(lengths)] if sizes is None else list(sizes)
        assert sum(self._sizes) == len(lengths)
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.longest = int(lengths.max(initial=0))
        self._seed = seed
        self._bands: list[NDArray[np.integer]] | None = None
        if scores is not None:
            ends = np.cumsum(self._sizes).tolist()
            parts = [scores[end - size : end] for size, end in zip(self._sizes, ends, strict=True)]
            self._bands = [bands_of(part, bands) for part in parts]
        self._ahead: list[tuple[int, int]] = []
        self._load(0)

    def permutation(self, epoch: int) -> Permutation | Sorted | InTurn:
        drawn = [
            Permutation(size, hashlib.sha256(f"2|{self._seed}|{self.name}|{epoch}{mark}".encode()).digest())
            for size, mark in zip(self._sizes, ["", *(f"|{n}" for n in range(1, len(self._sizes)))], strict=True)
        ]
        parts: list[Permutation | Sorted] = [*drawn]
        if self._bands is not None:
            parts = [Sorted(part, band) for part, band in zip(drawn, self._bands, strict=True)]
        return parts[0] if len(parts) == 1 else InTurn(parts)

    def tokens_of(self, generations: int) -> int:
        """Tokens of the first generations."""
        return int(self.lengths[: sum(self._sizes[:generations])].sum(dtype=np.int64))

    def seek(self, consumed: int) -> tuple[int, int]:
        """Seek to the position after `consumed` tokens; returns (document, offset) if one is open, else (-1, 0)."""
        epoch, within = divmod(consumed, self.tokens)
        self._load(epoch)
        while within:
            block = self.lengths[self._order(self._next, min(self._next + SEEK_BLOCK, self._order.size))]
            ends = np.cumsum(block, dtype=np.int64)
            index = int(np.searchsorted(ends, within, side="right"))
            self._next += index
            if index < len(block):
                offset = within - int(ends[index - 1]) if index else within
                return (self.next()[0], offset) if offset else (-1, 0)
            within -= int(ends[-1])
        return -1, 0

    def next(self) -> tuple[int, int]:
        """The next document and its length."""
        if not self._ahead:
            if self._next == self._order.size:
                self._load(self._epoch + 1)
            chosen = self._order(self._next, min(self._next + READ_AHEAD, self._order.size))
            self._next += len(chosen)
            self._ahead = list(zip(chosen.tolist(), self.lengths[chosen].tolist(), strict=True))[::-1]
        return self._ahead.pop()

    def _load(self, epoch: int) -> None:
        self._epoch, self._order, self._next, self._ahead = epoch, self.permutation(epoch), 0, []
