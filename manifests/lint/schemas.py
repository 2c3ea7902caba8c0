"""Write the tables of fields.

`python -m manifests.lint.schemas` writes kubernetes.json from Kubernetes' schemas in the package kubernetes-validate;
`python -m manifests.lint.schemas "$(go env GOMODCACHE)"` also writes operators.json, from the custom resource
definitions in the Go modules of `SOURCES`, which `go mod download` fetches.

Thousands of pages become one line per object: its fields with their types, in the notation that `fields` reads. Parts
of an operator's schema that equal Kubernetes' are not repeated; parts that differ (the pods of a PyTorchJob are those
of Kubernetes 1.31) have their own entry: PodSpec~2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from manifests.lint.fields import KUBERNETES, OPERATORS

KUBERNETES_RELEASE = "1.34"
# Module → folder of its definitions, the files to read there, and the release if it is Trainer.
_TRAINER = "manifests/base/crds", ("trainer.kubeflow.org_*",)
SOURCES = {
    "github.com/kubeflow/training-operator@v1.9.2": ("manifests/base/crds", ("*_pytorchjobs",), ""),
    "github.com/kubeflow/trainer/v2@v2.0.1": (*_TRAINER, "2.0"),
    "github.com/kubeflow/trainer/v2@v2.1.0": (*_TRAINER, "2.1"),
    "github.com/kubeflow/trainer/v2@v2.2.0": (*_TRAINER, "2.2"),
    "github.com/kubeflow/trainer/v2@v2.3.0": (*_TRAINER, "2.3"),
    "sigs.k8s.io/kueue@v0.17.0": ("config/components/crd/bases", ("kueue.x-k8s.io_*",), ""),
    "github.com/prometheus-operator/prometheus-operator@v0.86.1": (
        "example/prometheus-operator-crd",
        ("*_podmonitors", "*_servicemonitors", "*_prometheusrules"),
        "",
    ),
}
WORDS = "k8s.io/api@v0.34.4"  # Go types, whose comments mark enums
# Kubernetes schemas whose objects keep their short names if others have the same name.
_FIRST = ("io.k8s.api.core.v1.", "io.k8s.api.batch.v1.", "io.k8s.api.apps.v1.", "io.k8s.apimachinery.")
_LIMITS = ("enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties")
_QUANTITY = "[numkMGTPE]"
_SPECIAL = {
    "IntOrString": "int-or-string",
    "JSONSchemaProps": "any",  # contains itself
    "MicroTime": "time",
    "Quantity": "quantity",
    "Time": "time",
}
Schema = dict[str, Any]
Type = str | list[Any]
Table = dict[str, dict[str, Type]]


def kubernetes() -> Schema:
    """The tables of all kinds of Kubernetes itself; needs kubernetes-validate."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES_RELEASE}.0-local"
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    kinds = {name: s["x-kubernetes-group-version-kind"][0] for name, s in definitions.items() if _is_kind(s)}
    names: dict[str, str] = {}
    for full in sorted(_reachable(kinds, definitions), key=lambda n: (not n.startswith(_FIRST), n)):
        short = full.rpartition(".")[2]
        times = sum(name.partition("~")[0] == short for name in names.values())
        names[full] = f"{short}~{times + 1}" if times else short

    def type_of(schema: Schema) -> Type:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return _SPECIAL.get(name.rpartition(".")[2], names.get(name, "any"))
        return _type(schema, type_of)

    types = {}
    for full, name in names.items():
        schema = definitions[full]
        fields = {field: type_of(inside) for field, inside in schema["properties"].items()}
        types[name] = _fields(schema, fields)
        if full in kinds and "status" in fields:
            types[name]["status"] = "any"
    return {
        "source": f"kubernetes-validate, Kubernetes {KUBERNETES_RELEASE}",
        "kinds": {_kind(said["group"], said["version"], said["kind"]): names[full] for full, said in kinds.items()},
        "types": types,
    }


def operators(modules: Path) -> Schema:
    """The tables of the operators' kinds, and Kubernetes' enums, from a folder of Go modules.

    Raises:
        FileNotFoundError: a module is missing; the message has the command that fetches it.
    """
    reducer = Operators(json.loads(KUBERNETES.read_text(encoding="utf-8"))["types"], {})
    kinds: dict[str, Any] = {}
    for module, (folder, files, release) in SOURCES.items():
        for path in (
            path for name in files for path in sorted((_module(modules, module) / folder).glob(f"{name}.yaml"))
        ):
            definition = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]
            for version in definition["versions"]:
                kind = definition["names"]["kind"]
                key, schema = _kind(definition["group"], version["name"], kind), version["schema"]["openAPIV3Schema"]
                name = reducer.root(schema, kind)
                kinds[key] = kinds.get(key, {}) | {release: name} if release else name
    return {
        "source": [*SOURCES, WORDS],
        "kinds": kinds,
        "words": dict(_words(_module(modules, WORDS))),
        "types": reducer.found,
    }


class Operators:
    """Objects of custom resources, whose schemas are fully expanded, named after the same objects of Kubernetes.

    Attributes:
        known: Kubernetes' own objects.
        found: other objects; `root` adds those that differ from all existing ones.
    """

    def __init__(self, known: Table, found: Table) -> None:
        self.known, self.found = known, found
        self.ways = {name: frozenset(self._ways(name)) for name in known}

    def _ways(self, name: str) -> Iterator[str]:
        """Names of fields, two levels deep, which identify a kind of object."""
        for field, type_ in self.known[name].items():
            yield field
            yield from (f"{field}.{inside}" for inside in self.known.get(_inner(type_), ()))

    def root(self, schema: Schema, kind: str) -> str:
        """The name of a kind's object, by its openAPIV3Schema."""
        fields = dict(schema["properties"])
        fields.pop("status", None)
        types: dict[str, Type] = {name: self.type_of(inside, kind, name) for name, inside in fields.items()}
        types |= {"metadata": "ObjectMeta", "status": "any"}
        return self._named(_fields(schema, types), kind)

    def type_of(self, schema: Schema, parent: str, field: str) -> Type:
        if schema.get("x-kubernetes-int-or-string"):
            return "quantity" if _QUANTITY in schema.get("pattern", "") else "int-or-string"
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return "any"
        if schema.get("type") == "object" and "additionalProperties" not in schema:
            name = self._name(schema, parent, field)
            inside = {key: self.type_of(value, name, key) for key, value in schema.get("properties", {}).items()}
            return self._named(_fields(schema, inside), name)
        return _type(schema, lambda inner: self.type_of(inner, parent, field))

    def _name(self, schema: Schema, parent: str, field: str) -> str:
        """The name of Kubernetes' object in this place, or of the most similar one, or one made from the field's
        name."""
        if field == "metadata":
            return "ObjectMeta"
        of_parent = _inner(self.known.get(parent, {}).get(field, "any"))
        if of_parent in self.known:
            return of_parent
        ways = set(_schema_ways(schema))
        likeness = {name: len(ways & other) / len(ways | other) for name, other in self.ways.items() if ways & other}
        best = max(likeness, key=lambda name: (likeness[name], -len(name), name), default="")
        if best and len(ways) > 3 and likeness[best] > 0.6:
            return best.partition("~")[0]
        singular = re.sub(r"(?<=ch)es$|(?<![su])s$", "", re.sub("ies$", "y", field))
        own = singular[:1].upper() + singular[1:]
        return parent.removeprefix("Cluster") + own if own in ("Spec", "Template") else own

    def _named(self, fields: dict[str, Type], name: str) -> str:
        """The name of these fields in a table; they are added if missing."""
        for number in range(1, 100):
            numbered = name if number == 1 else f"{name}~{number}"
            there = self.known.get(numbered) or self.found.get(numbered)
            if there is None:
                self.found[numbered] = fields
            if there is None or there == fields:
                return numbered
        raise AssertionError(f"too many kinds of {name}")


def _type(schema: Schema, type_of: Any) -> Type:
    """string, time, bytes, boolean, int32, int64, number, quantity, int-or-string, any, an object's name, [list of] or
    {mapping of}; with limits, in JSON schema's own words, a pair: [type, limits].

    A list with merge keys names them: [Container name].
    """
    kinds = schema.get("type", "any")
    kind = next(kind for kind in kinds if kind != "null") if isinstance(kinds, list) else kinds
    limits = {name: schema[name] for name in _LIMITS if name in schema}
    inner = schema.get("items") if kind == "array" else schema.get("additionalProperties")
    if kind in ("array", "object"):
        text, inside = _split(type_of(inner)) if isinstance(inner, dict) else ("any", {})
        if inside:
            limits["items"] = inside
        keys = schema.get("x-kubernetes-list-map-keys", [])
        if schema.get("x-kubernetes-list-type") == "set":
            limits["set"] = True
        text = f"[{' '.join([text, *keys])}]" if kind == "array" else f"{{{text}}}"
    else:
        formats = {"int64": "int64", "date-time": "time", "byte": "bytes"}
        text = formats.get(schema.get("format", ""), {"integer": "int32"}.get(kind, kind))
    return [text, limits] if limits else text


def _fields(schema: Schema, types: dict[str, Type]) -> dict[str, Type]:
    """The fields in order; required ones are marked by !, fields with a default are not required."""
    needed = [name for name in schema.get("required", ()) if "default" not in schema["properties"].get(name, {})]
    found = {}
    for name in sorted(types):
        text, limits = _split(types[name])
        text += "!" * (name in needed)
        found[name] = [text, limits] if limits else text
    return found


def _split(type_: Type) -> tuple[str, Schema]:
    return (type_, {}) if isinstance(type_, str) else (type_[0], type_[1])


def _inner(type_: Type) -> str:
    """The name of the object in it."""
    return re.sub(r"[\[\]{}!]| .*", "", _split(type_)[0])


def _schema_ways(schema: Schema) -> Iterator[str]:
    for field, inside in schema.get("properties", {}).items():
        yield field
        for part in (inside, inside.get("items"), inside.get("additionalProperties")):
            yield from (f"{field}.{name}" for name in (part if isinstance(part, dict) else {}).get("properties", ()))


def _is_kind(schema: Schema) -> bool:
    said = schema.get("x-kubernetes-group-version-kind", [])
    fields = schema.get("properties", {})
    return len(said) == 1 and "metadata" in fields and not fields["metadata"].get("$ref", "").endswith("ListMeta")


def _kind(group: str, version: str, kind: str) -> str:
    return f"{group}/{version} {kind}".removeprefix("/")


def _reachable(kinds: Iterable[str], definitions: dict[str, Schema]) -> set[str]:
    """Objects that people write: not those that occur only in lists of objects or in a status."""
    found: set[str] = set()
    todo = list(kinds)
    while todo:
        name = todo.pop()
        fields = definitions[name].get("properties")
        if fields and name not in found:
            found.add(name)
            for field, inside in fields.items():
                parts = [inside, inside.get("items"), inside.get("additionalProperties")]
                if not (name in kinds and field == "status"):
                    inner = [p["$ref"].rpartition("/")[2] for p in parts if isinstance(p, dict) and "$ref" in p]
                    todo += [name for name in inner if name.rpartition(".")[2] not in _SPECIAL]
    return found


def _words(module: Path) -> Iterator[tuple[str, list[str]]]:
    """Object.field → accepted values, of the Go types marked +enum."""
    core = _enums((module / "core/v1/types.go").read_text(encoding="utf-8"))
    for path in sorted(module.glob("*/v*/types.go")):
        text = path.read_text(encoding="utf-8")
        own = _enums(text)
        for struct, body in re.findall(r"^type (\w+) struct \{\n(.*?)^\}", text, re.M | re.S):
            for package, type_, field in re.findall(r'^\s+\w+\s+[\[\]*]*(\w+\.)?(\w+)\s+`json:"(\w+)', body, re.M):
                words = (core if package else own).get(type_)
                if words and not struct.endswith(("Status", "Condition")):
                    yield f"{struct.removesuffix('Common')}.{field}", words


def _enums(text: str) -> dict[str, list[str]]:
    """Go type → its constants, for the marked types."""
    marked = set(re.findall(r"// \+enum\n(?:// ?.*\n)*type (\w+) string", text))
    found: dict[str, list[str]] = {}
    for type_, word in re.findall(r'^\s+\w+(?:\s+(?=\w+\s+= ")|\s+= )(\w+)(?:\s+= |\()"(.*)"', text, re.M):
        if type_ in marked:
            found.setdefault(type_, []).append(word)
    return found


def _module(modules: Path, module: str) -> Path:
    found = modules / module
    if not found.is_dir():
        raise FileNotFoundError(f"{found} is not there; run: go mod download {module}")
    return found


def text(content: Schema) -> str:
    """One line for each entry."""
    parts = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(inside)}" for name, inside in sorted(value.items()))
            parts.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    KUBERNETES.write_text(text(kubernetes()), encoding="utf-8")
    print(f"wrote {KUBERNETES}")
    if sys.argv[1:]:
        OPERATORS.write_text(text(operators(Path(sys.argv[1]))), encoding="utf-8")
        print(f"wrote {OPERATORS}")
