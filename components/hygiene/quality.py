"""Quality: the rules by which Gopher's web text was cleaned (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1).

They are rules of prose, hence for chosen domains only. Words are separated by white space. Two rules know the language:
the stop words are English and asked of English alone, and Korean words are shorter (see SHORTEST).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.hygiene.filters import DOCUMENT, Drop

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SHORTEST = {"en": 3.0, "ko": 2.0, "math": 2.0}  # mean length of words; Gopher's 3 is of English, the others are ours
BULLETS = ("\u2022", "\u2023", "\u25aa", "\u25cf", "-", "*")
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # the most frequent n-gram's share of the characters
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # the share of those that occur twice or more
VERSION = 1  # increase it with every change of a rule
RULES = (
    "words",
    "word_length",
    "symbols",
    "bullets",
    "ellipses",
    "alphabetic_words",
    "stop_words",
    "repeated_lines",
    "repeated_line_characters",
    "repeated_paragraphs",
    "repeated_paragraph_characters",
    *(f"top_{n}_gram" for n in TOP_GRAMS),
    *(f"repeated_{n}_grams" for n in REPEATED_GRAMS),
)
DTYPE = np.dtype([*DOCUMENT, ("domain", "u1"), ("rule", "u1"), ("value", "<f4")])
Broken = tuple[str, float]  # a rule, and the value of the text that it does not allow


class Quality:
    name = "quality"

    def __init__(self, domains: Sequence[str], domain_of: Mapping[str, str]) -> None:
        """`domains`: those that are cleaned; `domain_of`: the domain of each source."""
        self._domains = sorted(set(domains))
        self._sources = {name: domain for name, domain in sorted(domain_of.items()) if domain in self._domains}

    @property
    def settings(self) -> dict[str, Any]:
        return {"rules": f"Gopher {VERSION}", "domain_of": self._sources}

    def scanner(self) -> _Scanner:
        return _Scanner(self._domains)

    def decide(self, scans: Sequence[Path], files: Sequence[str]) -> Iterator[list[Drop]]:
        for number, (file, path) in enumerate(zip(files, scans, strict=True)):
            domain = self._sources.get(Path(file).parts[0])
            if domain is None:
                continue
            found = np.load(path)
            mine = found[found["domain"] == self._domains.index(domain)]
            yield [
                Drop(number, int(one["document"]), int(one["offset"]), int(one["bytes"]), _evidence(one))
                for one in mine
            ]


class _Scanner:
    """The scan does not know the source of its file, so it judges a text by the rules of each domain."""

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = domains
        self._records = list[tuple[int, int, int, int, int, float]]()

    def see(self, document: int, offset: int, text: str) -> None:
        measured = _Text(text)
        for number, domain in enumerate(self._domains):
            if broken := measured.broken(domain):
                size = len(text.encode())
                self._records.append((document, offset, size, number, RULES.index(broken[0]), broken[1]))

    def result(self) -> NDArray[Any]:
        return np.array(self._records, DTYPE)


def broken_rule(text: str, domain: str) -> Broken | None:
    """The first rule of the domain that the text breaks, with its value; None for a text that stays."""
    return _Text(text).broken(domain)


class _Text:
    def __init__(self, text: str) -> None:
        self._text, self._words = text, text.split()
        self._repetition: tuple[Broken | None] | None = None

    def broken(self, domain: str) -> Broken | None:
        words, count = self._words, len(self._words)
        if not 50 <= count <= 100_000:
            return "words", count
        length = sum(map(len, words)) / count
        if not SHORTEST[domain] <= length <= 10:
            return "word_length", length
        symbols = max(self._text.count("#"), self._text.count("...") + self._text.count("\u2026")) / count
        if symbols > 0.1:
            return "symbols", symbols
        lines = [line.strip() for line in self._text.splitlines() if line.strip()]
        for rule, share, most in (
            ("bullets", _share(lines, lambda line: line.startswith(BULLETS)), 0.9),
            ("ellipses", _share(lines, lambda line: line.endswith(("...", "\u2026"))), 0.3),
        ):
            if share > most:
                return rule, share
        alphabetic = _share(words, lambda word: any(map(str.isalpha, word)))
        if alphabetic < 0.8:
            return "alphabetic_words", alphabetic
        if domain == "en" and (found := len(STOP_WORDS.intersection(map(str.casefold, words)))) < 2:
            return "stop_words", found
        if self._repetition is None:
            self._repetition = (_repetition(self._text, lines, words),)
        return self._repetition[0]


def _repetition(text: str, lines: list[str], words: list[str]) -> Broken | None:
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    for name, parts in (("line", lines), ("paragraph", paragraphs)):
        again = list[str]()
        seen = set[str]()
        for part in parts:
            if part in seen:
                again.append(part)
            seen.add(part)
        if (share := len(again) / len(parts)) > 0.3:
            return f"repeated_{name}s", share
        if (share := sum(map(len, again)) / sum(map(len, parts))) > 0.2:
            return f"repeated_{name}_characters", share
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    total = len(text)
    for n, most in TOP_GRAMS.items():
        gram, times = Counter(zip(*(words[first:] for first in range(n)), strict=False)).most_common(1)[0]
        share = times * len(" ".join(gram)) / total
        if times > 1 and share > most:
            return f"top_{n}_gram", share
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    for n, most in REPEATED_GRAMS.items():
        share = float(sizes[_again(hashes, n)].sum()) / total
        if share > most:
            return f"repeated_{n}_grams", share
    return None


def _again(hashes: NDArray[np.uint64], n: int) -> NDArray[np.bool_]:
    """Which words are in an n-gram that occurred before; a word counts once, however many such n-grams it is in."""
    grams = np.zeros(len(hashes) - n + 1, np.uint64)
    for first in range(n):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[first : len(hashes) - n + 1 + first]
    _, firsts = np.unique(grams, return_index=True)
    again = np.ones(len(grams), np.int64)
    again[firsts] = 0
    inside = np.convolve(again, np.ones(n, np.int64))
    return inside > 0


def _share(parts: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, parts)) / len(parts) if parts else 0.0


def _evidence(one: Any) -> dict[str, Any]:
    return {"rule": RULES[int(one["rule"])], "value": round(float(one["value"]), 3)}
