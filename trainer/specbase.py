"""What every spec shares: frozen pydantic models, errors that say the fix, YAML + `a.b=c` loading, stable digests.

Files by a person, or by versions up to this one, are validated strictly. In a file of a later version (`spec_version`;
absent for 1), unknown fields are dropped with a warning if they cannot change what is computed, else refused. Imports
no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from trainer import __version__
from trainer.errors import SpecError
from trainer.fields import SPEC_VERSION, stored, version_of

VERSION_FIELD = "spec_version"
STORED_MARK = "# yaongi "

log = logging.getLogger(__name__)


class Spec(BaseModel):
    """Base of all specs: immutable, unknown fields rejected, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    # For a spec with its own files: sections that do not change what is computed. None: it has no files.
    sections_without_numbers: ClassVar[frozenset[str] | None] = None

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any) -> Any:
        """Refuse yes, no, on and off, which YAML reads as booleans and pydantic would accept as 1 and 0."""
        for name in set(cls.model_fields).intersection(value if isinstance(value, dict) else ()):
            types = set(_leaves(cls.model_fields[name].annotation))
            deep = not any(isinstance(each, type) and issubclass(each, BaseModel) for each in types)
            if types & {int, float} and bool not in types and _holds_truth(value[name], deep=deep):
                raise PydanticCustomError("truth_value", TRUTH, {"field": name})
        return value

    def digest(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON; equal specs give equal digests on every machine."""
        return canonical_digest(stored(self))

    def updated(self, changes: dict[str, Any]) -> Self:
        """A validated copy in which `changes` (nested dicts) replace the fields they name."""
        return parse(type(self), deep_merge(self.model_dump(mode="json"), changes))


TRUTH = "a number is wanted, not a truth value (yes, no, on, off, true, false); write a number"
MISSING = "required field is missing; add it"
# Prefix of a pydantic error type → expected value; other errors keep pydantic's message.
WANTED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
}
SpecT = TypeVar("SpecT", bound=Spec)


def begins_with(*names: str) -> Callable[[type[SpecT]], type[SpecT]]:
    """Put these fields, inherited or own, before the others of the class in files and schemas."""

    def ordered(spec_type: type[SpecT]) -> type[SpecT]:
        fields = spec_type.model_fields
        for name in [*names, *(name for name in fields if name not in names)]:
            fields[name] = fields.pop(name)
        spec_type.model_rebuild(force=True)
        return spec_type

    return ordered


class _Loader(yaml.SafeLoader):
    """The safe loader, but it reads 1e9 as a number, as in YAML 1.2 and JSON, not as a string."""


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def canonical_digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:12]


def deep_merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base`; dicts merge key by key, everything else (also lists) is replaced.

    A dict with another `kind` than the one it overrides has different fields, so it replaces that one.
    """
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _differs_in_kind(below, value):
            merged[key] = deep_merge(below, value)
        else:
            merged[key] = value
    return merged


def _differs_in_kind(base: dict[str, Any], changes: dict[str, Any]) -> bool:
    return "kind" in base and "kind" in changes and base["kind"] != changes["kind"]


def parse(spec_type: type[SpecT], value: Any, where: str = "", version: int = 1) -> SpecT:
    """Validate a spec written by a person or by some version of this program.

    Args:
        version: the program's version, for a part of a file; a spec with its own files contains it.

    Raises:
        SpecError: one line per problem, with the path of the field, and the nearest name for an unknown one; a single
            line for a file of a later version that this one cannot read.
    """
    prefix = f"{where}: " if where else ""
    if spec_type.sections_without_numbers is not None and isinstance(value, dict) and VERSION_FIELD in value:
        version = value[VERSION_FIELD]
        value = {name: inner for name, inner in value.items() if name != VERSION_FIELD}
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise SpecError(f"{prefix}{VERSION_FIELD}: expected a whole number from 1 on (got {version!r})")
    try:
        return spec_type.model_validate(value)
    except ValidationError as error:
        if version > SPEC_VERSION:
            return parse(spec_type, _of_later_version(spec_type, value, version, error, prefix), where)
        lines = [_explain(spec_type, dict(problem), value) for problem in error.errors()]
        raise SpecError("\n".join(prefix + line for line in lines)) from None


def _of_later_version(
    spec_type: type[Spec], value: Any, version: int, error: ValidationError, prefix: str
) -> dict[str, Any]:
    """`value` without the fields unknown to this version, if none of them can change what is computed.

    Raises:
        SpecError: one can, or a known field has an unknown value.
    """
    problems = [(problem["type"], [str(part) for part in problem["loc"]]) for problem in error.errors()]
    fields = ", ".join(".".join(path) for _, path in problems)
    said = f"{prefix}written by a later yaongi ({VERSION_FIELD} {version}, this one knows {SPEC_VERSION})"
    sections = spec_type.sections_without_numbers or frozenset()
    if any(
        kind != "extra_forbidden" or not any(".".join(path).startswith(f"{section}.") for section in sections)
        for kind, path in problems
    ):
        raise SpecError(f"{said}: {fields} may change what is computed; use that version or a newer one")
    log.warning("%s: %s unknown here and left out; no number depends on it", said, fields)
    known: dict[str, Any] = json.loads(json.dumps(value))
    for _, path in problems:
        inner: Any = known
        for part in path[:-1]:
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
        del inner[path[-1]]
    return known


def _explain(spec_type: type[Spec], problem: dict[str, Any], value: Any) -> str:
    path = _as_written(problem["loc"], value, missing=problem["type"] == "missing")
    where = ".".join(path) or spec_type.__name__
    if problem["type"] == "extra_forbidden":
        if deeper := _elsewhere(spec_type, path[-1]):
            return f"{where}: unknown field; did you mean '{deeper}'?"
        known = list(_fields_at(spec_type, path[:-1]))
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean '{'.'.join([*path[:-1], near[0]])}'?"
            if near
            else f"known fields: {', '.join(sorted(known))}"
        )
        return f"{where}: unknown field; {hint}"
    if problem["type"] == "truth_value":
        return f"{'.'.join([*path, problem['ctx']['field']])}: {TRUTH}"
    if problem["type"] == "missing":
        return f"{where}: {MISSING}"
    if problem["input"] is None and problem["type"].endswith("_type"):
        return f"{where}: has no value; give it one, or remove it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    wanted = next((said for begins, said in WANTED.items() if problem["type"].startswith(begins)), None)
    said = f"{wanted} is wanted" if wanted else message.replace("Input should be", "must be")
    return f"{where}: {said} (got {problem['input']!r}){_how(path, problem)}"


def _how(path: list[str], problem: dict[str, Any]) -> str:
    """How to write a text that YAML takes for something else."""
    given = problem["input"]
    if problem["type"] == "string_type" and isinstance(given, bool | int | float):
        text = str(given).lower() if isinstance(given, bool) else given
        return f"; put it in quotes: '{text}' in a file, \"'{text}'\" after --set"
    if problem["type"] == "string_type" and isinstance(given, dict) and len(path) > 1:
        return f"; write a name with dots in braces: '{'.'.join(path[:-1])}={{NAME: TEXT}}'"
    return ""


def _as_written(place: Sequence[str | int], value: Any, *, missing: bool) -> list[str]:
    """The path of a problem in `value`, without the union tags that pydantic inserts."""
    path = []
    for number, part in enumerate(place, start=1):
        if isinstance(value, dict) and part not in value and not (missing and number == len(place)):
            continue
        if not isinstance(value, dict | list | tuple):
            break
        path.append(str(part))
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
    return path


def _fields_at(spec_type: type[Spec], path: list[str]) -> set[str]:
    """Field names of the model at `path`, through optionals, lists, dicts and unions."""
    candidates: list[Any] = [spec_type]
    for part in path:
        found: list[Any] = []
        for candidate in candidates:
            fields = getattr(candidate, "model_fields", {})
            if part in fields:
                found += _models_in(fields[part].annotation)
        # An index into a list, a key of a dict or the tag of a union stays on the same models.
        candidates = found or candidates
    return {name for candidate in candidates for name in candidate.model_fields}


def _elsewhere(spec_type: type[BaseModel], name: str, depth: int = 3) -> str | None:
    """Shortest path to a field `name` in nested models, such as train.steps for steps."""
    level = [("", spec_type)]
    for _ in range(depth):
        below = [
            (f"{path}{field}.", model)
            for path, of in level
            for field, info in of.model_fields.items()
            if get_origin(info.annotation) is not dict  # whose keys stand between
            for model in _models_in(info.annotation)
        ]
        if found := [f"{path}{name}" for path, model in below if name in model.model_fields]:
            return found[0]
        level = below
    return None


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation; for a dict, those of its values."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal or not arguments:
        yield annotation
        return
    for argument in arguments[1:] if get_origin(annotation) is dict else arguments:
        yield from _leaves(argument)


def _holds_truth(value: Any, *, deep: bool) -> bool:
    if deep and isinstance(value, dict):
        return any(_holds_truth(each, deep=True) for each in value.values())
    if deep and isinstance(value, list | tuple):
        return any(_holds_truth(each, deep=True) for each in value)
    return isinstance(value, bool)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON mapping from a file.

    Raises:
        SpecError: the file is missing, unreadable, not YAML or not a mapping.
    """
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SpecError(f"{path}: cannot read the spec ({said}); check the path and its permissions") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SpecError(f"{path}: fields are nested hundreds of levels deep; no spec has more than ten") from None
    if not isinstance(value, dict):
        raise SpecError(f"{path}: a spec is a mapping of fields, found {type(value).__name__}")
    return value


def changes_from_sets(assignments: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=20", "a.b=c"]` → nested dict; values are read as YAML, so numbers, lists and null work.

    Raises:
        SpecError: an assignment without '=', or whose value is not YAML.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise SpecError(f"--set {assignment}: write it as field.subfield=value")
        try:
            value: Any = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise SpecError(
                f"--set {assignment}: the value is not valid YAML ({reason}); quote or complete it"
            ) from None
        for part in reversed(path.strip().split(".")):
            value = {part: value}
        changes = deep_merge(changes, value)
    return changes


def to_yaml(spec: Spec) -> str:
    """The spec as YAML that `parse` reads back to an equal spec, in every version that knows its fields."""
    return yaml.safe_dump(_versioned(spec), sort_keys=False, allow_unicode=True, width=120)


def to_stored_yaml(spec: Spec) -> bytes:
    """`to_yaml` for a stored file: its first line names the writer."""
    return f"{STORED_MARK}{__version__}, {VERSION_FIELD} {version_of(spec)}\n{to_yaml(spec)}".encode()


def is_stored(path: str | Path) -> bool:
    """Whether `to_stored_yaml` wrote the file, not a person."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(STORED_MARK)


def to_json(spec: Spec) -> str:
    """The spec as JSON for a reader that may be of another version."""
    return json.dumps({VERSION_FIELD: version_of(spec)} | stored(spec), ensure_ascii=False)


def _versioned(spec: Spec) -> dict[str, Any]:
    """Add the version field, except for version 1, which has none and refuses it."""
    version = version_of(spec)
    fields: dict[str, Any] = stored(spec)
    return ({VERSION_FIELD: version} if version > 1 else {}) | fields
