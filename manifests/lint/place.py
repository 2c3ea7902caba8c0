"""A value in a manifest with its path; lookups never fail.

Users' manifests can have a wrong structure anywhere; a rule that reads a field then gets an empty place instead of an
exception. The structure itself is checked by the rules about the API server's schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

Path = tuple[str | int, ...]

_QUANTITY = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))([numk]|[KMGTPE]i|[MGTPE]|[eE][+-]?[0-9]+)?")
_SUFFIXES = {suffix: Decimal(1000) ** power for power, suffix in enumerate(("n", "u", "m", "", "k"), -3)}
_SUFFIXES |= {letter: Decimal(1000) ** power for power, letter in enumerate("KMGTPE", 1)}
_SUFFIXES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}


@dataclass(frozen=True)
class Place:
    """`value` is None for a missing value."""

    value: Any
    path: Path = ()

    def __getitem__(self, key: str) -> Place:
        inside = self.value.get(key) if isinstance(self.value, dict) else None
        return Place(inside, (*self.path, key))

    def __bool__(self) -> bool:
        """Whether anything is written here, even 0 or false."""
        return self.value is not None

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def each(self) -> Iterator[Place]:
        """Elements of a list."""
        if isinstance(self.value, list):
            for index, element in enumerate(self.value):
                yield Place(element, (*self.path, index))

    def fields(self) -> Iterator[tuple[str, Place]]:
        """Keys and places of a mapping."""
        if isinstance(self.value, dict):
            for key, element in self.value.items():
                yield str(key), Place(element, (*self.path, str(key)))

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else ""

    @property
    def number(self) -> int | None:
        """An integer; None for anything else, even a string of digits."""
        return self.value if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    @property
    def quantity(self) -> Decimal | None:
        """A resource quantity of apimachinery ("1500m", "2Gi", 8) in base units; None if it is invalid or below 0."""
        found = _QUANTITY.fullmatch(str(self.value)) if isinstance(self.value, str | int | float) else None
        if found is None or isinstance(self.value, bool):
            return None
        number, suffix = found[1], found[2] or ""
        try:
            amount = Decimal(number) * _SUFFIXES[suffix] if suffix in _SUFFIXES else Decimal(number + suffix)
        except InvalidOperation:
            return None
        return amount if amount >= 0 else None

    def __str__(self) -> str:
        return path_text(self.path)


def path_text(path: Path) -> str:
    """spec.template.containers[0].env[2].value; a key that contains dots is put in brackets."""
    parts = []
    for step in path:
        if isinstance(step, int):
            parts.append(f"[{step}]")
        elif "." in step:
            parts.append(f'["{step}"]')
        else:
            parts.append(f".{step}")
    return "".join(parts).removeprefix(".")
