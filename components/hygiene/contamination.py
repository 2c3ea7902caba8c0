"""Contamination: documents that share n words in a row with an evaluation text.

Overlap of 13-grams is what GPT-3 was cleaned by (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are runs of
letters, digits and underscores, case folded after Unicode compatibility composition (NFKC), so punctuation and layout
do not hide a copy. An evaluation text of fewer than n words cannot be looked for; the report counts those.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.hygiene.filters import DOCUMENT, Drop

DTYPE = np.dtype([*DOCUMENT, ("gram", "<u4")])
WORD = re.compile(r"\w+")
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, with scattered bits: the base of the rolling hash of word hashes, modulo 2^64
FILTER_BITS = 24  # a table of so many bits of hash rules out nearly all n-grams of a document at once
KNOWN_WORDS = 2**20  # word hashes kept


class Contamination:
    name = "contamination"

    def __init__(self, evaluation: dict[str, list[str]], ngram: int) -> None:
        """`evaluation` are the texts of each evaluation set."""
        self._ngram = ngram
        self._origins = [(name, number) for name, texts in evaluation.items() for number in range(len(texts))]
        self._words = [words(text) for texts in evaluation.values() for text in texts]
        hashes, sources, starts = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        hasher = GramHasher(ngram)
        for number, text in enumerate(self._words):
            grams = hasher(text)
            hashes.append(grams)
            sources.append(np.full(len(grams), number))
            starts.append(np.arange(len(grams)))
        self._hashes, unique = np.unique(np.concatenate(hashes), return_index=True)
        self._sources, self._starts = np.concatenate(sources)[unique], np.concatenate(starts)[unique]
        self.too_short = sum(len(text) < ngram for text in self._words)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "ngram": self._ngram,
            "ngrams": len(self._hashes),
            "evaluation_texts": len(self._words),
            "evaluation_texts_too_short": self.too_short,
            "evaluation": xxhash.xxh3_128_hexdigest(b"".join(map(bytes, (self._hashes, self._sources, self._starts)))),
        }

    def scanner(self) -> _Scanner:
        return _Scanner(self._hashes, self._ngram)

    def decide(self, scans: Sequence[Path], files: Sequence[str]) -> Iterator[list[Drop]]:
        for file, path in enumerate(scans):
            yield [
                Drop(
                    file, int(hit["document"]), int(hit["offset"]), int(hit["bytes"]), self._evidence(int(hit["gram"]))
                )
                for hit in np.load(path)
            ]

    def _evidence(self, gram: int) -> dict[str, Any]:
        source, start = int(self._sources[gram]), int(self._starts[gram])
        name, number = self._origins[source]
        shared = " ".join(self._words[source][start : start + self._ngram])
        return {"evaluation": name, "text": number, "words": shared}


class _Scanner:
    def __init__(self, hashes: NDArray[np.uint64], ngram: int) -> None:
        self._hashes, self._hasher = hashes, GramHasher(ngram)
        self._table = np.zeros(2**FILTER_BITS, bool)
        self._table[hashes >> np.uint64(64 - FILTER_BITS)] = True
        self._records = list[tuple[int, int, int, int]]()

    def see(self, document: int, offset: int, text: str) -> None:
        grams = self._hasher(words(text))
        maybe = grams[self._table[grams >> np.uint64(64 - FILTER_BITS)]]
        if len(maybe):
            at = np.minimum(np.searchsorted(self._hashes, maybe), len(self._hashes) - 1)
            found = np.flatnonzero(self._hashes[at] == maybe)
            if len(found):
                self._records.append((document, offset, len(text.encode()), int(at[found[0]])))

    def result(self) -> NDArray[Any]:
        return np.array(self._records, DTYPE)


class GramHasher:
    """64-bit hashes of all runs of n words: a polynomial in the words' hashes."""

    def __init__(self, ngram: int) -> None:
        self._powers = [np.uint64(pow(MULTIPLIER, power, 2**64)) for power in range(ngram)]
        self._known = dict[str, int]()

    def __call__(self, text: list[str]) -> NDArray[np.uint64]:
        count = len(text) - len(self._powers) + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        if len(self._known) > KNOWN_WORDS:
            self._known.clear()
        known = self._known
        for word in text:
            if word not in known:
                known[word] = xxhash.xxh3_64_intdigest(word.encode())
        each = np.fromiter((known[word] for word in text), np.uint64, len(text))
        total = np.zeros(count, np.uint64)
        for place, power in enumerate(self._powers):
            total += each[place : place + count] * power
        return total


def words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
