"""The fields of the APIs: Kubernetes, the training operators, Kueue and the Prometheus operator.

`schemas` writes the tables from their schemas. They are loaded lazily: most runs never need them.
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
    """The type of a value.

    Attributes:
        kind: string, time, bytes, boolean, int32, int64, number, quantity, int-or-string, any, list, mapping or object.
        name: an object's entry in the tables.
        of: type of the elements of a list or mapping.
        keys: fields that must be unique among the elements of a list.
        needed: whether it is required.
        limits: JSON schema limits such as enum and maxLength; `words`: values that Kubernetes accepts, "" meaning the
            default.
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
        """The name of its object, or of the objects in its list or mapping; "" for none."""
        return self.of.object if self.of else self.name


_PLAIN = ("string", "time", "bytes", "boolean", "int32", "int64", "number", "quantity", "int-or-string", "any")


@cache
def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    kubernetes, operators = (json.loads(path.read_text(encoding="utf-8")) for path in (KUBERNETES, OPERATORS))
    return kubernetes, operators


@cache
def fields(name: str) -> dict[str, Type]:
    """The fields of an object; those of Kubernetes have their `words`."""
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
    """PodSpec for PodSpec~2, a variant of another release or one that an operator reduced."""
    return name.partition("~")[0]


@cache
def _kinds() -> dict[str, dict[str, str | dict[str, str]]]:
    """Kind → API version → object, by Trainer release where it matters."""
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
    """The known kinds that an API version serves."""
    return [kind for kind, of in _kinds().items() if api_version in of]


@cache
def own_groups() -> frozenset[str]:
    """API groups of Kubernetes itself, and the former group of Deployments."""
    return frozenset(key.rpartition("/")[0] for key in _tables()[0]["kinds"]) | {"extensions"}


def of_kind(api_version: Any, kind: str, trainer: str) -> str:
    """The object of a kind; "" for an unknown kind.

    Args:
        trainer: release of Kubeflow Trainer.
    """
    known = _kinds().get(kind, {})
    name = known.get(str(api_version)) or ""
    return name if isinstance(name, str) else name[trainer]


def is_custom(name: str) -> bool:
    """Whether it is an operator's kind, of which the API server has only the schema."""
    return name in _tables()[1]["types"]


@cache
def at(name: str, way: Way) -> str:
    """The object at a path inside another; "" for none."""
    type_ = Type("object", name)
    for step in way:
        inner = type_.of or (fields(type_.name).get(str(step)) if type_.name else None)
        if inner is None:
            return ""
        type_ = inner
    return type_.name
