"""The fields that the APIs know: of Kubernetes' own kinds, the training operators', Kueue's and Prometheus' operator's.

`schemas` writes the tables from their schemas. They are read at the first question: most runs never ask.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from manifests.lint.place import Path as Way

TRAINER_VERSIONS = ("2.0", "2.1", "2.2", "2.3")
KUBERNETES, OPERATORS = (Path(__file__).with_name(f"{name}.json") for name in ("kubernetes", "operators"))


@dataclass(frozen=True)
class Type:
    """What may stand somewhere.

    Attributes:
        kind: string, time, bytes, boolean, int32, int64, number, quantity, int-or-string, any, list, mapping or object.
        name: of an object's entry in the tables.
        of: the elements of a list or mapping.
        keys: of which no two elements of a list may have the same.
        needed: whether it must be there.
        limits: of JSON schema, such as enum and maxLength; `words` of Kubernetes, of which "" is the default.
    """

    kind: str
    name: str = ""
    of: Type | None = None
    keys: tuple[str, ...] = ()
    needed: bool = False
    limits: dict[str, Any] = field(default_factory=dict)

    @property
    def element(self) -> Type:
        """Of a list or mapping."""
        assert self.of is not None, f"{self.kind} has no elements"
        return self.of

    @property
    def object(self) -> str:
        """Of the object that it is, or a list or mapping has; "" for none."""
        return self.of.object if self.of else self.name


_PLAIN = ("string", "time", "bytes", "boolean", "int32", "int64", "number", "quantity", "int-or-string", "any")


@cache
def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    kubernetes, operators = (json.loads(path.read_text(encoding="utf-8")) for path in (KUBERNETES, OPERATORS))
    return kubernetes, operators


@cache
def fields(name: str) -> dict[str, Type]:
    """Of an object. Those of Kubernetes know their words."""
    kubernetes, operators = _tables()
    found = {}
    for key, said in (kubernetes["types"].get(name) or operators["types"][name]).items():
        text, limits = (said, {}) if isinstance(said, str) else said
        words = operators["words"].get(f"{plain(name)}.{key}")
        if words:
            limits = limits | ({"items": {"words": words}} if text.startswith("[") else {"words": words})
        found[key] = _parsed(text, limits)
    return found


def _parsed(text: str, limits: dict[str, Any]) -> Type:
    needed, text = text.endswith("!"), text.removesuffix("!")
    inner = limits.get("items", {})
    if text.startswith("["):
        found = re.fullmatch(r"(\[.*\]|\{.*\}|\S*)(.*)", text[1:-1])
        assert found is not None, f"the table has {text}"
        of, keys = _parsed(found[1], inner), tuple(found[2].split())
        return Type("list", of=of, keys=keys, needed=needed, limits=limits)
    if text.startswith("{"):
        return Type("mapping", of=_parsed(text[1:-1], inner), needed=needed, limits=limits)
    kind, name = (text, "") if text in _PLAIN else ("object", text)
    return Type(kind, name, needed=needed, limits=limits)


def plain(name: str) -> str:
    """PodSpec of PodSpec~2, which another release has, or an operator cut."""
    return name.partition("~")[0]


@cache
def _kinds() -> dict[str, dict[str, str | dict[str, str]]]:
    """Kind → API version → object, by release of Trainer where that matters."""
    found: dict[str, dict[str, str | dict[str, str]]] = {}
    for table in _tables():
        for key, name in table["kinds"].items():
            version, _, kind = key.partition(" ")
            found.setdefault(kind, {})[version] = name
    return found


def versions(kind: str) -> list[str]:
    """API versions that serve a kind."""
    return list(_kinds().get(kind, ()))


def kinds(api_version: str) -> list[str]:
    """Kinds that an API version serves, of those known."""
    return [kind for kind, of in _kinds().items() if api_version in of]


@cache
def own_groups() -> frozenset[str]:
    """API groups of Kubernetes itself, and the one in which deployments once were."""
    return frozenset(key.rpartition("/")[0] for key in _tables()[0]["kinds"]) | {"extensions"}


def of_kind(api_version: Any, kind: str, trainer: str) -> str:
    """The object that a kind is; "" for one that is not known.

    Args:
        trainer: release of Kubeflow Trainer.
    """
    known = _kinds().get(kind, {})
    name = known.get(str(api_version)) or ""
    return name if isinstance(name, str) else name[trainer]


def is_custom(name: str) -> bool:
    """Whether an operator's kind, for which the API server knows only the schema."""
    return name in _tables()[1]["types"]


@cache
def at(name: str, way: Way) -> str:
    """The object that stands at a way into another; "" for none."""
    type_ = Type("object", name)
    for step in way:
        inner = type_.of or (fields(type_.name).get(str(step)) if type_.name else None)
        if inner is None:
            return ""
        type_ = inner
    return type_.name
