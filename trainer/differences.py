"""Differences of specs, field by field. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

MISSING = object()


@dataclass(frozen=True)
class Difference:
    """A field and its value in each of the specs, as text."""

    field: str
    values: tuple[str, ...]


def differences(specs: Sequence[Any], path: str = "") -> list[Difference]:
    """The fields whose values are not the same in all `specs` (plain JSON values), in the order of the specs.

    Mappings are compared field by field, everything else as a whole. A field that some spec lacks has the text "–".
    """
    if all(isinstance(spec, Mapping) for spec in specs):
        names = dict.fromkeys(name for spec in specs for name in spec)
        return [
            each
            for name in names
            for each in differences([spec.get(name, MISSING) for spec in specs], f"{path}.{name}" if path else name)
        ]
    first, *others = specs
    if all(other is not MISSING and first is not MISSING and other == first for other in others):
        return []
    return [Difference(path, tuple(_text(spec) for spec in specs))]


def _text(value: Any) -> str:
    if value is MISSING:
        return "–"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)  # all digits, as a spec file has them
    if isinstance(value, str):
        return value
    return yaml.safe_dump(
        _given(value), default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6
    ).strip()


def _given(value: Any) -> Any:
    """Without fields that are null."""
    if isinstance(value, Mapping):
        return {name: _given(inner) for name, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value
