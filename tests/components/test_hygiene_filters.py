"""The hygiene filters against brute force on small corpora."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from components.hygiene import duplicates
from components.hygiene.contamination import Contamination
from components.hygiene.duplicates import ExactDuplicates
from components.hygiene.filters import Drop, Filter, visible
from components.hygiene.report import beginning

Files = list[list[str]]


def dropped(each: Filter, files: Files) -> list[Drop]:
    """What the filter drops from a corpus; line n of a file starts at byte 1000 n."""
    with tempfile.TemporaryDirectory() as folder:
        scans = []
        for number, texts in enumerate(files):
            scanner = each.scanner()
            for document, text in enumerate(texts):
                scanner.see(document, 1000 * document, text)
            scans.append(Path(folder) / f"{number}.npy")
            np.save(scans[-1], scanner.result())
        found = [drop for drops in each.decide(scans, [f"f{n}" for n in range(len(files))]) for drop in drops]
    for drop in found:
        assert drop.offset == 1000 * drop.document
        assert drop.bytes == len(files[drop.file][drop.document].encode())
    assert len({(drop.file, drop.document) for drop in found}) == len(found)
    return sorted(found, key=lambda drop: (drop.file, drop.document))


def documents(files: Files) -> Iterator[tuple[int, int, str]]:
    for file, texts in enumerate(files):
        for document, text in enumerate(texts):
            yield file, document, text


# Few different texts, so that there are duplicates; spaces, and both ways to write Hangul and accents.
TEXT = st.text("a é\u0301e\n\t가\u1100\u1161\u00ad\u200b\ufe0f", max_size=4) | st.text(max_size=3)
INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")


@pytest.mark.parametrize("records", [2**21, 2])
@settings(deadline=None)
@given(files=st.lists(st.lists(TEXT, max_size=6), max_size=5))
def test_of_equal_texts_only_the_first_stays(records: int, files: Files) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "RECORDS", records)
        found = dropped(ExactDuplicates(), files)
    first: dict[str, tuple[int, int]] = {}
    expected = []
    for file, document, text in documents(files):
        key = " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", text)).split())
        if key in first:
            expected.append((file, document, first[key]))
        else:
            first[key] = (file, document)
    said = [(drop.evidence["same_as"]["file"], drop.evidence["same_as"]["document"]) for drop in found]
    assert [(drop.file, drop.document) for drop in found] == [(file, document) for file, document, _ in expected]
    assert said == [(f"f{file}", document) for _, _, (file, document) in expected]


def brute_force_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()
    return "".join(c if c.isalnum() or c == "_" else " " for c in folded).split()


WORDS = st.lists(st.sampled_from(["a", "b", "B\u00ad", "\u200b가", "7", "x\u200d_y"]), max_size=12)
PROSE = st.builds(lambda words, by: by.join(words), WORDS, st.sampled_from([" ", ", ", "\n", "-"]))


@settings(deadline=None)
@given(files=st.lists(st.lists(PROSE, max_size=5), max_size=4), tests=st.lists(PROSE, max_size=4), n=st.integers(2, 5))
def test_documents_that_share_n_words_in_a_row_are_dropped(files: Files, tests: list[str], n: int) -> None:
    each = Contamination({"one": tests[:2], "two": tests[2:]}, n)
    found = dropped(each, files)
    grams = {}
    for number, text in enumerate(tests):
        words = brute_force_words(text)
        for start in range(len(words) - n + 1):
            grams.setdefault(tuple(words[start : start + n]), set()).add(number)
    expected = []
    for file, document, text in documents(files):
        words = brute_force_words(text)
        if any(tuple(words[start : start + n]) in grams for start in range(len(words) - n + 1)):
            expected.append((file, document))
    assert [(drop.file, drop.document) for drop in found] == expected
    for drop in found:
        shared = tuple(drop.evidence["words"].split())
        number = drop.evidence["text"] + (2 if drop.evidence["evaluation"] == "two" else 0)
        assert number in grams[shared]
        words = brute_force_words(files[drop.file][drop.document])
        assert any(tuple(words[start : start + n]) == shared for start in range(len(words)))
    assert each.settings["evaluation_texts_too_short"] == sum(len(brute_force_words(text)) < n for text in tests)


def test_thirteen_words_are_enough_and_twelve_are_not() -> None:
    question = " ".join(f"word{n}" for n in range(20))
    each = Contamination({"exam": [question]}, 13)
    twelve, thirteen = (" ".join(question.split()[3 : 3 + n]) for n in (12, 13))
    found = dropped(each, [[f"Before. {twelve} after", f"BEFORE {thirteen.upper()}! after"]])
    assert [(drop.file, drop.document) for drop in found] == [(0, 1)]
    assert found[0].evidence == {"evaluation": "exam", "text": 0, "words": thirteen}


def test_invisible_characters_are_those_of_unicode() -> None:
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert visible(every) == INVISIBLE.sub("", every)
    assert visible("soft\u00adhyphen") == "softhyphen" and visible("مـ١\u0600") == "مـ١\u0600"


@pytest.mark.parametrize("hidden", ["\u00ad", "\u200b", "\u200c", "\u2060", "\ufeff", "\u202e", "\ufe0f", "\u3164"])
def test_invisible_characters_hide_nothing(hidden: str) -> None:
    words = [f"Wort{n}é" for n in range(14)]
    plain = " ".join(words)
    spread = " ".join(word[:2] + hidden + word[2:-1] + "e" + hidden + "\u0301" for word in words)
    assert len(dropped(Contamination({"exam": [plain]}, 13), [[spread]])) == 1
    assert len(dropped(Contamination({"exam": [spread]}, 13), [[plain.upper()]])) == 1
    assert [drop.document for drop in dropped(ExactDuplicates(), [[plain, spread, hidden + plain]])] == [1, 2]


SEEN_AS_ONE = [
    "a",
    "e\u0301",
    "한",
    "\u1112\u1161\u11ab",
    "하\u11ab",
    "🐈\u200d⬛",
    "👍🏽",
    "🇰🇷",
    "\r\n",
    "❤\ufe0f",
    " ",
]


@given(st.lists(st.sampled_from(SEEN_AS_ONE)).map("".join), st.integers(1, 8))
def test_a_beginning_ends_between_what_readers_take_for_characters(text: str, length: int) -> None:
    found = beginning(text, length)
    ends = [match.end() for match in regex.finditer(r"\X", text) if match.end() <= length]
    assert text.startswith(found) and len(found) == (ends[-1] if ends else min(length, len(text)))
