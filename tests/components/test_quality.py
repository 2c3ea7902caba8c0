"""Each rule of the quality filter by a text that breaks only it, on both sides of its limit."""

from __future__ import annotations

import random

import pytest
from test_hygiene_filters import dropped

from components.hygiene.quality import RULES, Quality, broken_rule

RNG = random.Random(0)
STOPS = "the of and to"


def prose(words: int, length: int = 5) -> list[str]:
    """Different words, hence without repetition."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(RNG.choice(letters) for _ in range(length)) for _ in range(words)]


GOOD = " ".join([*prose(200), STOPS])
LINES = [" ".join([*prose(20), STOPS]) for _ in range(20)]


NUMBERS = [str(n) * 5 for n in range(100)]
DOTS = [word + "..." for word in prose(40)]
P = prose(100)


def repeated(pieces: int) -> list[str]:
    """Five-word pieces of P, apart."""
    return [word for n in range(pieces) for word in [*P[5 * n : 5 * n + 5], *prose(1)]]


def text(*words: str) -> str:
    return " ".join([*words, STOPS])


def lines(some: list[str], end: str = "") -> str:
    return "\n".join(line + end for line in some)


CASES: list[tuple[str, str, str]] = [
    ("words", text(*prose(45)), text(*prose(46))),
    ("word_length", text(*prose(200, 2)), text(*prose(200, 4))),
    ("word_length", text(*prose(200, 11)), text(*prose(200, 10))),
    ("symbols", text(*prose(200), *["###"] * 10), text(*prose(200), *["##"] * 8)),
    ("symbols", text(*prose(180), *DOTS[:25]), text(*prose(180), *DOTS[:15])),
    ("bullets", lines(["- " + line for line in LINES]), lines(["- " + line for line in LINES[:17]] + LINES[17:])),
    ("ellipses", lines(LINES[:7], "...") + "\n" + lines(LINES[7:]), lines(LINES[:5], "...") + "\n" + lines(LINES[5:])),
    ("alphabetic_words", text(*prose(100), *NUMBERS[:40]), text(*prose(100), *NUMBERS[:20])),
    ("stop_words", " ".join([*prose(100), "the the"]), " ".join([*prose(100), "the Of"])),
    ("repeated_lines", lines([*LINES[:10], *LINES[:6]]), lines([*LINES, *LINES[:2]])),
    ("repeated_line_characters", lines([*prose(40), *[GOOD] * 2]), lines([*prose(40), GOOD])),
    ("top_2_gram", text(*prose(60), *["ababababab", "cdcdcdcdcd"] * 9), text(*prose(60), *["abab", "cdcd"])),
    ("repeated_5_grams", text(*P, *repeated(10)), text(*P, *repeated(2))),
]


@pytest.mark.parametrize(("rule", "breaks", "stays"), CASES)
def test_each_rule(rule: str, breaks: str, stays: str) -> None:
    broken = broken_rule(breaks, "en")
    assert broken is not None and broken[0] == rule and rule in RULES
    assert broken_rule(stays, "en") is None


def test_korean_needs_no_english_words_and_its_short_words_are_right() -> None:
    rng = random.Random(3)
    syllables = "가나다라마바사아자차카타파하서울부산대구인천"
    text = " ".join("".join(rng.choice(syllables) for _ in range(rng.choice((2, 3)))) for _ in range(200))
    assert broken_rule(text, "ko") is None
    assert broken_rule(text, "en") == ("word_length", pytest.approx(2.5, abs=0.2))
    assert broken_rule(" ".join(prose(100)), "en") == ("stop_words", 0)


def test_only_the_domains_asked_for_are_cleaned() -> None:
    each = Quality(["en"], {"f0": "en", "f1": "code", "f2": "ko"})
    found = dropped(each, [["short", GOOD], ["short"], ["short"]])
    assert [(drop.file, drop.document, drop.evidence) for drop in found] == [(0, 0, {"rule": "words", "value": 1.0})]
    assert each.settings["domain_of"] == {"f0": "en"}
