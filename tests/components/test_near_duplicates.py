"""Near-duplicates against exact Jaccard similarity, and what the filter decides."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from test_hygiene_filters import dropped

from components.hygiene import near_duplicates
from components.hygiene.contamination import GramHasher
from components.hygiene.near_duplicates import HASHES, NearDuplicates, rows_for, signatures

KOREAN = [
    "서울",
    "부산",
    "대구",
    "인천",
    "광주",
    "대전",
    "울산",
    "세종",
    "경기",
    "강원",
    "충북",
    "충남",
    "전북",
    "전남",
    "경북",
    "경남",
    "제주",
]


def runs(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[first : first + n]) for first in range(len(words) - n + 1)}


def jaccard(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def article(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(KOREAN) + rng.choice(["은", "는", "에서", ""]) + str(rng.randrange(50)) for _ in range(words)]


def changed(rng: random.Random, words: list[str], changes: int) -> list[str]:
    words = list(words)
    for at in rng.sample(range(len(words)), changes):
        words[at] = f"new{rng.randrange(10**9)}"
    return words


def test_the_estimate_is_near_the_exact_similarity() -> None:
    rng, hasher, errors = random.Random(0), GramHasher(5), []
    for changes in range(0, 40, 2):
        one = article(rng, 300)
        pair = [" ".join(one), " ".join(changed(rng, one, changes))]
        made = signatures([hasher(text.split()) for text in pair])
        assert made.shape == (2, HASHES)
        exact = jaccard(*pair)
        errors.append(float(np.mean(made[0] == made[1])) - exact)
        assert abs(errors[-1]) < 4 * (exact * (1 - exact) / HASHES) ** 0.5 + 1e-9
    assert abs(np.mean(errors)) < 0.03, "no bias"


@pytest.mark.parametrize("records", [2**21, 3])
def test_what_is_almost_an_earlier_text_is_left_out(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    monkeypatch.setattr(near_duplicates, "RECORDS", records)
    rng = random.Random(1)
    files: list[list[str]] = [[], [], []]
    for number in range(30):
        original = article(rng, 250)
        files[number % 2].append(" ".join(original))
        files[2].append(" ".join(changed(rng, original, 2 if number < 20 else 25)))  # similarity 0.92 or below 0.4
    files[2] += ["too short", "too short"]
    found = dropped(NearDuplicates(0.8), files)
    every = [(file, document, text) for file, texts in enumerate(files) for document, text in enumerate(texts)]
    expected = [
        (file, document)
        for at, (file, document, text) in enumerate(every)
        if any(runs(text) and jaccard(text, earlier) >= 0.8 for _, _, earlier in every[:at] if runs(earlier))
    ]
    assert [(drop.file, drop.document) for drop in found] == expected and len(expected) == 20
    for drop in found:
        same = drop.evidence["same_as"]
        original = files[int(same["file"][1:])][same["document"]]
        assert abs(jaccard(original, files[drop.file][drop.document]) - drop.evidence["similarity"]) < 0.12


def test_a_decision_holds_when_text_is_appended() -> None:
    rng = random.Random(2)
    chain = [article(rng, 200)]
    for _ in range(12):
        chain.append(changed(rng, chain[-1], 3))
    texts = [" ".join(words) for words in chain]
    rng.shuffle(texts)
    whole = dropped(NearDuplicates(0.7), [texts[:6], texts[6:]])
    part = dropped(NearDuplicates(0.7), [texts[:6]])
    assert [drop for drop in whole if drop.file == 0] == part and part
    assert whole == dropped(NearDuplicates(0.7), [texts[:6], texts[6:]]), "the same again"


def test_bands_find_pairs_at_the_threshold() -> None:
    assert rows_for(0.8) == 8, "14 bands of 8, as FineWeb's"
    assert all(rows_for(low / 100) <= rows_for(high / 100) for low, high in pairwise(range(50, 101)))
