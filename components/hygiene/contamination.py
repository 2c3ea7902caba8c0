"""Contamination: documents that share n consecutive words with an evaluation text.

GPT-3's data was cleaned by 13-gram overlap (Brown et al. 2020, arXiv:2005.14165, appendix C). Words are runs of
letters, digits and underscores, without invisible characters, case folded after Unicode compatibility composition
(NFKC), so that punctuation, layout and soft hyphens do not hide a copy. Evaluation texts of fewer than n words cannot
be searched for; the report counts them.
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

from components.hygiene.filters import DOCUMENT, INVISIBLE, Drop, visible

DTYPE = np.dtype([*DOCUMENT, ("gram", "<u4")])
WORD = re.compile(r"\w+")
MULTIPLIER = 0x9E3779B97F4A7C15  # base of the rolling hash of word hashes modulo 2^64: odd, with scattered bits
SPARSENESS = 64  # table entries per n-gram; the table rejects nearly all other n-grams at once
KNOWN_WORDS = 2**20  # cached word hashes


class Contamination:
    name = "contamination"

    def __init__(self, evaluation: dict[str, list[str]], ngram: int) -> None:
        """`evaluation`: the texts of each evaluation set."""
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
        } | INVISIBLE

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
        bits = max(len(hashes) * SPARSENESS, 2).bit_length()
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        self._table[hashes >> self._shift] = True
        self._records = list[tuple[int, int, int, int]]()

    def see(self, document: int, offset: int, text: str) -> None:
        grams = self._hasher(words(text))
        maybe = grams[self._table[grams >> self._shift]]
        if len(maybe):
            at = np.minimum(np.searchsorted(self._hashes, maybe), len(self._hashes) - 1)
            found = np.flatnonzero(self._hashes[at] == maybe)
            if len(found):
                self._records.append((document, offset, len(text.encode()), int(at[found[0]])))

    def result(self) -> NDArray[Any]:
        return np.array(self._records, DTYPE)


class GramHasher:
    """64-bit hashes of all runs of n words: Σ word[i+k] · M^k modulo 2^64, from differences of one cumulative sum."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._powers, self._inverses = _powers(MULTIPLIER, 1), _powers(MULTIPLIER, 1)
        self._known = dict[str, int]()

    def __call__(self, text: list[str]) -> NDArray[np.uint64]:
        count = len(text) - self._ngram + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        if len(text) > len(self._powers):
            self._powers = _powers(MULTIPLIER, 2 * len(text))
            self._inverses = _powers(pow(MULTIPLIER, -1, 2**64), 2 * len(text))
        sums = np.zeros(len(text) + 1, np.uint64)
        np.cumsum(self._word_hashes(text) * self._powers[: len(text)], out=sums[1:])
        return (sums[self._ngram :] - sums[:count]) * self._inverses[:count]

    def _word_hashes(self, text: list[str]) -> NDArray[np.uint64]:
        known = self._known
        if len(known) > KNOWN_WORDS:
            known.clear()
        for word in set(text).difference(known):
            known[word] = xxhash.xxh3_64_intdigest(word.encode())
        return np.fromiter(map(known.__getitem__, text), np.uint64, len(text))


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base^0 … base^(count - 1) modulo 2^64."""
    every = np.full(count, base, np.uint64)
    every[0] = 1
    return np.cumprod(every, dtype=np.uint64)


def words(text: str) -> list[str]:
    text = visible(text)
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.casefold())
