"""Walk an object along its API's schema and report what the API server, or the validation of pods, rejects."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from manifests.lint import validation
from manifests.lint.fields import TRAINER_VERSIONS, Type, at, fields, is_custom, of_kind, plain
from manifests.lint.place import Path, Place, path_text

Kind = Literal[
    "unknown", "missing", "string", "number", "type", "quantity", "word", "range", "twice", "one-of", "name", "template"
]
MESSAGE_CHARACTERS = 60
_WHOLE = {"int32": 2**31, "int64": 2**63}


@dataclass(frozen=True)
class Problem:
    """`meant`: where the values under unknown names belong, if known."""

    kind: Kind
    place: Place
    what: str
    meant: tuple[Path, ...] = ()

    def explains(self, path: Path) -> bool:
        """Whether a problem at a path may only follow from this one: it has the same place, or the name that is
        missing."""
        ways = [self.place.path, *self.meant]
        around = [way[:-1] for way in ways if way and isinstance(way[-1], int)]
        around += [way[:n] for way in ways if way[-1:] in (("name",), ("mountPath",)) for n in (-1, -2)]
        return any(path[: len(way)] == way for way in ways) or path in around


def problems(place: Place, object: str, version: str) -> list[Problem]:
    """Yield the problems in the structure of a Kubernetes object.

    Args:
        object: its type, an entry in the tables of `fields`.
        version: of Kubeflow Trainer.
    """
    walk = _Walk(object, place, version, is_custom(object))
    return [*_name_of(place), *walk.object(place, object)]


@dataclass(frozen=True)
class _Walk:
    root: str
    top: Place
    version: str
    is_custom: bool  # an operator's kind: the API server checks only its schema

    def object(self, place: Place, object: str) -> Iterator[Problem]:
        known, kind = fields(object), plain(object)
        unknown = [(name, inside) for name, inside in place.fields() if name not in known]
        if unknown:
            said = ", ".join(f"'{_cut(name)}'{self._hint(name, place, object)}" for name, _ in unknown)
            meant = tuple((*place.path, _nearest(name, object, 0.6)) for name, _ in unknown)
            yield Problem("unknown", unknown[0][1], f"unknown field{'s' if unknown[1:] else ''} {said}", meant)
        missing = [name for name, type_ in known.items() if self._is_missing(place[name], f"{kind}.{name}", type_)]
        if missing and not unknown:  # else it may only be misspelled
            yield Problem("missing", place[missing[0]], f"no {', '.join(missing)}")
        for name, type_ in known.items():
            if place[name] and name not in missing:
                yield from self.value(place[name], type_, f"{kind}.{name}")
        if kind == "PodSpec":
            yield from _named_twice(place)
        if kind == "JobSpec" and not self.is_custom:
            yield from _restarting(place)
        if kind == "PersistentVolumeClaimSpec" and not self.is_custom:
            yield from _sized(place["resources"])
        if kind in validation.ONE_OF and not missing:
            yield from _one_of(place, kind, known, self.is_custom)

    def _is_missing(self, place: Place, where: str, type_: Type) -> bool:
        if self.is_custom:
            return not place and type_.needed and where not in validation.TOLD
        if where in validation.NEEDED:
            return place.value in (None, "")
        return not place and type_.needed and where not in validation.NOT_NEEDED

    def value(self, place: Place, type_: Type, where: str) -> Iterator[Problem]:
        """Problems of the value; one reason is a template that was not filled in."""
        found = list(self._value(place, type_, where))
        if isinstance(place.value, str) and validation.VARIABLE.search(place.value) and found:
            found = [Problem("template", place, f"{_name(place)} is still '{_cut(place.value)}'")]
        yield from found

    def _value(self, place: Place, type_: Type, where: str) -> Iterator[Problem]:
        value, name = place.value, _name(place)
        match type_.kind:
            case "string" | "time" | "bytes":
                if not isinstance(value, str):
                    yield Problem("string", place, f"{name} is {described(value)}")
                else:
                    yield from _text(place, type_, where)
            case "int32" | "int64":
                limits, bound = type_.limits, _WHOLE[type_.kind]
                if not _is_whole(value):
                    yield Problem("number", place, f"{name} is {described(value)}")
                else:
                    bounds = limits.get("minimum", -bound), limits.get("maximum", bound - 1)
                    yield from _within(place, validation.RANGES.get(where, bounds))
            case "number":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    yield Problem("number", place, f"{name} is {described(value)}")
            case "boolean":
                if not isinstance(value, bool):
                    yield Problem("type", place, f"{name} is {described(value)}, not true or false")
            case "int-or-string":
                if isinstance(value, str):
                    yield from _text(place, type_, where)
                elif not _is_whole(value):
                    yield Problem("type", place, f"{name} is {described(value)}, not a number or text")
                elif where in validation.RANGES or not self.is_custom:
                    yield from _within(place, validation.RANGES.get(where, (-(2**31), 2**31 - 1)))
            case "quantity":
                yield from self._quantity(place)
            case "list":
                yield from self._list(place, type_, where)
            case "mapping" | "object":
                if not isinstance(value, dict):
                    hint = "; remove the dash before its first field" if isinstance(value, list) else ""
                    yield Problem("type", place, f"{name} is {described(value)}, not a mapping{hint}")
                elif type_.kind == "mapping":
                    yield from self._mapping(place, type_, where)
                else:
                    yield from self.object(place, type_.name)

    def _list(self, place: Place, type_: Type, where: str) -> Iterator[Problem]:
        if not isinstance(place.value, list):
            hint = "; each entry begins with a dash" if isinstance(place.value, dict) else ""
            yield Problem("type", place, f"{_name(place)} is {described(place.value)}, not a list{hint}")
            return
        fewest = 1 if where in validation.NOT_EMPTY else type_.limits.get("minItems", 0)
        yield from _count(place, fewest, type_.limits.get("maxItems"))
        seen: Counter[tuple[str, ...]] = Counter()
        name, elements = _name(place), fields(type_.element.name) if type_.element.name else {}
        as_set = self.is_custom and type_.limits.get("set")
        for inside in place.each():
            if inside:
                yield from self.value(inside, type_.element, where)
            elif self.is_custom or any(field.needed for field in elements.values()):
                yield Problem("type", inside, f"an element of {name} is empty")
            key = tuple(str(inside[key].value or ("TCP" if key == "protocol" else "")) for key in type_.keys)
            key = (str(inside.value),) if as_set else key
            if any(key) and not (where in validation.TWICE and (name == "env" or not self.is_custom)):
                seen[key] += 1
                if seen[key] == 2:
                    there, said = (inside[type_.keys[0]], f"{type_.keys[0]} ") if type_.keys else (inside, "")
                    yield Problem("twice", there, f"{said}'{_cut(key[0])}' is there twice in {name}")

    def _mapping(self, place: Place, type_: Type, where: str) -> Iterator[Problem]:
        yield from _count(place, type_.limits.get("minProperties", 0), None)
        for name, inside in place.fields():
            found = list(self.value(inside, type_.element, "")) if inside else []
            if where.startswith("Secret."):  # whose values nobody shows
                found = [
                    replace(problem, what=f"{name} is no {'base64' if type_.element.kind == 'bytes' else 'text'}")
                    for problem in found
                ]
            yield from found
            if found:
                continue
            if where.startswith(validation.RESOURCES):
                near = get_close_matches(name.lower(), validation.GPUS, 1, cutoff=0.85)
                if near and name != near[0] and not name.startswith((near[0] + ".", near[0] + "-")):
                    yield Problem("name", inside, f"resource '{name}'; did you mean '{near[0]}'?")
                elif not validation.RESOURCE.fullmatch(name):
                    hint = "; GPUs are nvidia.com/gpu" if "gpu" in name.lower() else ""
                    yield Problem("name", inside, f"'{name}' is not a resource{hint}")
            elif where in validation.DATA:
                if not validation.DATA_KEY.fullmatch(name):
                    yield Problem("name", inside, f"key '{_cut(name)}' is not of letters, digits, -, _ and .")
            elif where in validation.LABELS:
                if isinstance(inside.value, str) and validation.VARIABLE.search(inside.value):
                    yield Problem("template", inside, f"{name} is still '{_cut(inside.value)}'")
                elif not validation.LABEL_KEY.fullmatch(name):
                    yield Problem("name", inside, f"'{_cut(name)}' is not a valid label key")
                elif isinstance(inside.value, str) and not validation.LABEL_VALUE.fullmatch(inside.value):
                    yield Problem("name", inside, f"'{_cut(inside.value)}' is not a valid label value")

    def _quantity(self, place: Place) -> Iterator[Problem]:
        written, name = place.value, _name(place)
        if place.quantity is not None:
            is_fraction = isinstance(written, float) and not _is_whole(written)
            if is_fraction and self.is_custom and "/" not in name:  # GPUs are covered by gpu-limit
                yield Problem("quantity", place, f'{name}: a fraction is a text here: "{written}"')
            return
        text = str(written)
        if text.startswith("-") and Place(text[1:]).quantity is not None:
            yield Problem("range", place, f"{name}: {text} is below 0")
            return
        hint, digits = "", re.fullmatch(r"([0-9.]+)\s*([kmgtpe])i?b?", text.strip().lower())
        if isinstance(written, str) and digits:
            hint = f"; did you mean {digits[1]}{digits[2].upper()}i?"
        yield Problem("quantity", place, f"{name}: {described(written)} is not a quantity{hint}")

    def _hint(self, name: str, place: Place, object: str) -> str:
        """The likely meaning of an unknown field, if known."""
        kind, api_version = self.top["kind"].text, self.top["apiVersion"].value
        roots = {version: of_kind(api_version, kind, version) for version in TRAINER_VERSIONS}
        having = [v for v, root in roots.items() if root and name in fields(at(root, place.path) or root)]
        if having:
            said = validation.RENAMED.get(name, f"in {', '.join(having)} it does")
            return f" (in Trainer {self.version} it does not exist: {said})"
        if plain(object) == "ResourceRequirements" and validation.RESOURCE.fullmatch(name):
            return " (it belongs to limits or requests)"
        near, way = _nearest(name, object, 0.85), place.path
        if near:
            return f" (did you mean '{near}'?)"
        homes = [(way, object)] + [(way[:n], at(self.root, way[:n])) for n in range(len(way) - 1, -1, -1)]
        nearest = _nearest(name, object, 0.6)
        for depth, (way, home) in enumerate(homes[:6]):
            if home and depth and name in fields(home):
                return f" (it belongs to {path_text(way) or 'the top'})"
            for field, type_ in fields(home).items() if home and not (depth and nearest) else ():
                if type_.object and name in fields(type_.object) and type_.object != object:
                    return f" (it belongs to {path_text((*way, field))})"
        return f" (did you mean '{nearest}'?)" if nearest else ""


def _nearest(name: str, object: str, cutoff: float) -> str:
    by_lower = {known.lower(): known for known in fields(object)}
    found = get_close_matches(name.lower(), by_lower, 1, cutoff)
    return by_lower[found[0]] if found else ""


def _name_of(place: Place) -> Iterator[Problem]:
    """Problems of an object's name."""
    kind, metadata = place["kind"].text, place["metadata"]
    name, known = metadata["name"], fields("ObjectMeta")
    if name.value in (None, "") and not metadata["generateName"]:
        told = metadata and not (isinstance(metadata.value, dict) and known.keys() >= metadata.value.keys())
        if not told and not kind.endswith(validation.WITHOUT_NAME):
            yield Problem("missing", name, "no metadata.name")
    elif name.text and kind not in validation.FREELY_NAMED:
        yield from _named(name, *validation.OBJECT_NAMES.get(kind, validation.OTHER_NAMES))


def _named_twice(spec: Place) -> Iterator[Problem]:
    used = {container["name"].text for container in spec["containers"].each()}
    for container in spec["initContainers"].each():
        if container["name"].text in used:
            what = f"name '{container['name'].text}' is there in initContainers and containers"
            yield Problem("name", container["name"], what)


def _restarting(job: Place) -> Iterator[Problem]:
    pod = job["template"]["spec"]
    policy, written = pod["restartPolicy"], pod.value if isinstance(pod.value, dict) else {}
    is_told = not pod["containers"] or written.keys() - fields("PodSpec").keys()
    if policy.value == "Always" or (not policy and not is_told):
        said = "Always" if policy else "left out, which is Always"
        yield Problem("word", policy, f"restartPolicy of a Job is {said}, not Never or OnFailure")


def _sized(resources: Place) -> Iterator[Problem]:
    requests = resources["requests"]
    is_told = not isinstance(resources.value, dict) or resources.value.keys() - {"limits", "requests"}
    if not is_told and requests.value in (None, {}):
        yield Problem("missing", requests["storage"], "no storage in resources.requests")


def _named(place: Place, pattern: str, longest: int, allowed: str) -> Iterator[Problem]:
    if re.fullmatch(pattern, place.text) and len(place.text) <= longest:
        return
    if validation.VARIABLE.search(place.text) or "$(" in place.text:
        yield Problem("template", place, f"{_name(place)} is still '{_cut(place.text)}'")
    else:
        said = f" of at most {longest} characters" if longest < 2**31 else ""
        yield Problem("name", place, f"{_name(place)} '{_cut(place.text)}' is not of {allowed}{said}")


def _text(place: Place, type_: Type, where: str) -> Iterator[Problem]:
    text, name, limits = place.text, _name(place), type_.limits
    words = limits.get("words") or validation.WORDS.get(where, "").split()
    if type_.kind == "time" and not validation.TIME.fullmatch(text):
        yield Problem("type", place, f"{name} is {described(text)}, not a time as 2026-01-31T12:00:00Z")
    elif type_.kind == "bytes" and not _is_base64(text):
        yield Problem("type", place, f"{name} is not base64")
    elif text not in (limits.get("enum") or ([*words, ""] if words else [text])):
        said = ", ".join(filter(None, limits.get("enum") or words))
        yield Problem("word", place, f"{name} '{_cut(text)}' is none of {said}")
    elif where in validation.NAMES:
        yield from _named(place, *validation.NAMES[where])
    elif len(text) < limits.get("minLength", 0) and where not in validation.TOLD:
        yield Problem("name", place, f"{name} is empty")
    elif len(text) > limits.get("maxLength", 2**31):
        yield Problem("name", place, f"{name} has {len(text)} characters, more than {limits['maxLength']}")
    elif "pattern" in limits and not re.search(limits["pattern"], text):
        yield Problem("name", place, f"{name} '{_cut(text)}' is not of the pattern {limits['pattern']}")


def _within(place: Place, bounds: tuple[int, int]) -> Iterator[Problem]:
    low, high = bounds
    if not low <= place.value <= high:
        yield Problem("range", place, f"{_name(place)} {place.value} is outside of {low} to {high}")


def _count(place: Place, fewest: int, most: int | None) -> Iterator[Problem]:
    count = len(place.value)
    if count < fewest or (most is not None and count > most):
        bound = f"fewer than {fewest}" if count < fewest else f"more than {most}"
        yield Problem("range", place, f"{_name(place)} has {count} entries, {bound}")


def _one_of(place: Place, kind: str, known: dict[str, Type], is_custom: bool) -> Iterator[Problem]:
    said = validation.ONE_OF[kind]
    several = [name for name in known if name != "name"] if said == "*" else said.split()
    if said == "*" and not is_custom:  # a volume of nothing becomes an emptyDir, which a job does not tell
        several.append("?")
    there = [name for name in several if place[name] and (name, place[name].value) != ("value", "")]
    if len(there) > 1:
        yield Problem("one-of", place[there[1]], f"{' and '.join(there)} exclude each other")
    elif not there and "?" not in several and isinstance(place.value, dict):
        empty = next((name for name in several if name in place), None)
        what = f"{empty} is empty; write {empty}: {{}}" if empty else f"none of {', '.join(several[:8])}"
        if not any(name not in known for name in place.value):  # that is reported, and this may follow from it
            yield Problem("one-of", place, f"{kind} of nothing: {what}")


def described(value: object) -> str:
    """Describe a value that has the wrong type."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{_cut(value)}'"
    return "a list" if isinstance(value, list) else "a mapping"


def _name(place: Place) -> str:
    """The last name in the path."""
    named = next((step for step in reversed(place.path) if isinstance(step, str)), "it")
    return f"an element of {named}" if place.path and isinstance(place.path[-1], int) else named


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"


def _is_whole(value: object) -> bool:
    """Clients write 2.0 as 2."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError):
        return False
    return True
