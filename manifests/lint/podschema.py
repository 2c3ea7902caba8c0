"""The fields of pods and batch jobs, from Kubernetes' own schemas: `python -m manifests.lint.podschema` writes them.

podschema.json has, for each object, its fields with their types in the short notation that `structure` reads. Only the
generator needs the package kubernetes-validate, whose schemas of every release are a hundred times as large.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

# What the PyTorchJob of training operator 1.9 was built with, and JobSet 0.10 to 0.12: their own schemas say the same.
OLDER, NEWER = "1.31", "1.34"
NEWER_MARK = "^"  # a field that the older release does not know
ROOTS = ("io.k8s.api.core.v1.PodTemplateSpec", "io.k8s.api.batch.v1.JobTemplateSpec")
FILE = Path(__file__).with_name("podschema.json")
Schema = dict[str, Any]
Table = dict[str, dict[str, str]]


@cache
def table() -> Table:
    """Object → field → type; the names of objects are those of Kubernetes' API without their group."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def generate() -> Table:
    """The table anew; needs kubernetes-validate."""
    older, newer = _definitions(OLDER), _definitions(NEWER)
    found: Table = {}
    todo = list(ROOTS)
    while todo:
        name = todo.pop()
        schema, before = newer[name], older.get(name, {}).get("properties", {})
        if _short(name) in found or "properties" not in schema:
            continue
        fields = found[_short(name)] = {}
        for field, inside in schema["properties"].items():
            needed = "!" if field in schema.get("required", ()) else ""
            fields[field] = _type(inside, newer) + needed + ("" if field in before else NEWER_MARK)
            todo += _references(inside)
    return {name: dict(sorted(fields.items())) for name, fields in sorted(found.items())}


def text() -> str:
    """The file's content."""
    lines = (f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in generate().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _definitions(version: str) -> dict[str, Schema]:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local"
    return json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]


def _type(schema: Schema, definitions: dict[str, Schema]) -> str:
    """string, integer, boolean, quantity, int-or-string, any, an object's name, [list of] or {mapping of}.

    A list that is a mapping in disguise names the keys that no two of its elements may share: [Container name].
    """
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith("resource.Quantity"):
            return "quantity"
        if name.endswith("intstr.IntOrString"):
            return "int-or-string"
        if name.endswith(("meta.v1.Time", "meta.v1.MicroTime")):
            return "string"
        return _short(name) if "properties" in definitions[name] else "any"
    kinds = schema.get("type", "any")
    kind = next(kind for kind in kinds if kind != "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        keys = schema.get("x-kubernetes-list-map-keys", [])
        return f"[{' '.join([_type(schema['items'], definitions), *keys])}]"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"{{{_type(values, definitions)}}}" if isinstance(values, dict) else "any"
    return kind


def _references(schema: Schema) -> list[str]:
    nested = [schema, schema.get("items"), schema.get("additionalProperties")]
    return [part["$ref"].rpartition("/")[2] for part in nested if isinstance(part, dict) and "$ref" in part]


def _short(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
