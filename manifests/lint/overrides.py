"""A TrainJob's changes to its runtime's pods: podSpecOverrides (2.0), podTemplateOverrides (2.1), runtimePatches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.lint.fields import Type, fields
from manifests.lint.place import Place

CONTAINERS = ("Container", "EphemeralContainer")  # one that the runtime lacks cannot run: trainjob-unknown-container


def overridden(template: Place, replicated_job: str, job: Place, version: str) -> Place:
    """The pod template of a replicated job with the TrainJob's changes merged in, at the template's place.

    Merged like a strategic merge patch of the API: mappings by key, lists with a merge key by that key, anything else
        replaced.
    """
    value = template.value
    for patch in _patches(replicated_job, job):
        if isinstance(value, dict):
            value = _merged(value, patch, Type("object", "PodTemplateSpec"))
    return Place(value, template.path)


def _patches(replicated_job: str, job: Place) -> Iterator[dict[str, Any]]:
    spec = job["spec"]
    for override in spec["podSpecOverrides"].each():
        if replicated_job in _targets(override) and isinstance(override.value, dict):
            yield {"spec": {key: value for key, value in override.value.items() if key != "targetJobs"}}
    for override in spec["podTemplateOverrides"].each():
        if replicated_job in _targets(override):
            yield {"metadata": override["metadata"].value, "spec": override["spec"].value}
    for patch in spec["runtimePatches"].each():
        for entry in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"].each():
            pod = entry["template"]["spec"]["template"]
            if entry["name"].text == replicated_job and isinstance(pod.value, dict):
                yield pod.value


def _targets(override: Place) -> list[str]:
    return [target["name"].text for target in override["targetJobs"].each()]


def _merged(base: Any, patch: Any, type_: Type) -> Any:
    if patch is None:
        return base
    if type_.keys and isinstance(base, list | None) and isinstance(patch, list):
        return _merged_list(base or [], patch, type_)
    if isinstance(base, dict) and isinstance(patch, dict) and type_.name != "Volume":  # a volume has one source
        known, other = fields(type_.name) if type_.name else {}, Type("any")
        merged = {name: _merged(base.get(name), value, known.get(name, other)) for name, value in patch.items()}
        return {**base, **merged}
    return patch


def _merged_list(base: list[Any], patch: list[Any], type_: Type) -> list[Any]:
    found, key = list(base), type_.keys[0]
    for entry in patch:
        name = entry.get(key) if isinstance(entry, dict) else None
        at = next((n for n, other in enumerate(found) if isinstance(other, dict) and other.get(key) == name), None)
        if name is None or at is None:
            if type_.object not in CONTAINERS:
                found.append(entry)
        else:
            found[at] = _merged(found[at], entry, type_.element)
    return found
