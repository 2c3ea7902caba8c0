"""The interface of a filter; registry.py lists the filters.

Filtering is a map and a reduce: a filter's scanner sees every document of one raw file once and returns an array; then
`decide` reads the arrays of all files and selects the documents to drop. Arrays of finished files survive a crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

# In every filter's settings since texts are compared without invisible characters; earlier results lack it.
INVISIBLE = {"invisible_characters": "left out"}
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
DOCUMENT = [("document", "<u4"), ("offset", "<u8"), ("bytes", "<u4")]  # the first fields of every scan


@dataclass(frozen=True)
class Drop:
    """A document that a filter drops: its line in raw file number `file`, the line's byte offset, its text's bytes."""

    file: int
    document: int
    offset: int
    bytes: int
    evidence: dict[str, Any]


class Scanner(Protocol):
    def see(self, document: int, offset: int, text: str) -> None:
        """Scan the next document of the file."""

    def result(self) -> NDArray[Any]:
        """A structured array whose fields begin with those of DOCUMENT."""


class Filter(Protocol):
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the raw file on which a scan's result depends."""

    def scanner(self) -> Scanner: ...

    def decide(self, scans: Sequence[Path], files: Sequence[str]) -> Iterator[list[Drop]]:
        """The documents to drop, each once, in batches that fit in memory.

        Args:
            scans: the arrays (.npy) of all raw files, in the manifest's order.
            files: the raw files' paths, relative to the raw stage.
        """


def visible(text: str) -> str:
    """The text without invisible characters: Unicode's default ignorable code points (UAX #44, DerivedCoreProperties).

    These are soft hyphens, zero-width joiners and spaces, direction marks, variation selectors and Hangul fillers. They
    are removed only for comparison, never from stored text.
    """
    return text if text.isascii() else IGNORABLE.sub("", text)
