"""Read YAML as Kubernetes does, with the line of every value.

PyYAML's safe loader with the numbers and booleans of Go's YAML: dates and 1:20 are strings, y and 0123456789 are not.
Duplicate keys in a mapping, of which the API server silently takes the last, are recorded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from manifests.lint.place import Path
from manifests.yamltext import GO_BOOLEAN, GO_FLOAT, GO_INTEGER
from trainer.errors import SpecError


class Unreadable(SpecError):
    """The input is not YAML; the message has the place and the fix."""


@dataclass
class Document:
    """One Kubernetes object of the input. `path` leads to it from the top of its YAML document (through a List)."""

    value: dict[str, Any]
    source: str
    node: yaml.Node
    path: Path = ()
    duplicates: tuple[Path, ...] = ()

    def line(self, path: Path) -> int:
        """Line, from 1, of the value at `path` in the object, or of the nearest enclosing value."""
        node, line = self.node, self.node.start_mark.line
        for step in (*self.path, *path):
            found = _child(node, step)
            if found is None:
                break
            node, line = found
        return line + 1


if TYPE_CHECKING or not yaml.__with_libyaml__:
    _SafeLoader = yaml.SafeLoader
else:  # in every wheel of PyYAML; scans many times faster

    class _SafeLoader(Composer, yaml.cyaml.CParser, SafeConstructor, Resolver):
        """Events from libyaml, nodes composed in Python: libyaml's composer is recursive and crashes the process at too
        many levels; Python's raises RecursionError."""

        def __init__(self, text: str) -> None:
            yaml.cyaml.CParser.__init__(self, text)
            for part in (Composer, SafeConstructor, Resolver):
                part.__init__(self)


class _Loader(_SafeLoader):
    """The safe loader with the number formats of Go's YAML."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    leading_zero = re.fullmatch(r"([-+]?)0([0-7]+)", digits)
    return int(f"{leading_zero[1]}0o{leading_zero[2]}" if leading_zero else digits, 0)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    digits = node.value.replace("_", "").lower()
    number = float(digits.replace(".inf", "inf").replace(".nan", "nan"))
    return int(number) if number.is_integer() and "." not in digits else number


def _boolean(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return node.value.lower() in ("y", "yes", "true", "on")


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float", "bool")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _convert, _first in (
    ("int", GO_INTEGER, _integer, "-+0123456789"),
    ("float", GO_FLOAT, _float, "-+.0123456789"),
    ("bool", GO_BOOLEAN, _boolean, "yYnNtTfFoO"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), list(_first))
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _convert)


def read(text: str, source: str) -> Iterator[Document]:
    """Every Kubernetes object in a YAML or JSON text of one or more documents; a List counts as its items.

    Raises:
        Unreadable: not YAML, or a document is not a mapping with apiVersion and kind.
    """
    try:
        yield from _objects(text, source)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        template = "; it is a template: render it first (helm template, kustomize build)" if "{{" in text else ""
        raise Unreadable(f"{source}{_position(error)}: not readable as YAML ({_problem(error)}){template}") from None


def _objects(text: str, source: str) -> Iterator[Document]:
    loader = _Loader(text)
    try:
        while loader.check_node() and (node := loader.get_node()) is not None:
            duplicates = tuple(_duplicates(node))  # before construction, which adds the keys merged by `<<`
            value = loader.construct_document(node)
            if value is None:  # a comment between two ---
                continue
            if not (isinstance(value, dict) and isinstance(value.get("kind"), str) and "apiVersion" in value):
                where = f"{source}:{node.start_mark.line + 1}"
                raise Unreadable(f"{where}: not a Kubernetes object (apiVersion and kind are missing)")
            if value["kind"].endswith("List") and isinstance(value.get("items"), list):
                for index, item in enumerate(value["items"]):
                    if isinstance(item, dict):
                        yield _item(Document(item, source, node, ("items", index), duplicates))
                continue
            yield Document(value, source, node, duplicates=duplicates)
    finally:
        loader.dispose()


def _item(document: Document) -> Document:
    depth = len(document.path)
    own = tuple(path[depth:] for path in document.duplicates if path[:depth] == document.path)
    return replace(document, duplicates=own)


def _duplicates(top: yaml.Node) -> Iterator[Path]:
    """Paths of duplicate keys."""
    todo: list[tuple[yaml.Node, Path]] = [(top, ())]
    done: set[int] = set()  # an alias points to the same node
    while todo:
        node, path = todo.pop()
        if id(node) in done:
            continue
        done.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            yield from ((*path, key) for key, times in Counter(keys).items() if times > 1)
            todo += [(value, (*path, str(key.value))) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(value, (*path, index)) for index, value in enumerate(node.value)]


def _child(node: yaml.Node, step: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == step:
                return value, key.start_mark.line
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line
    return None


def _position(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
