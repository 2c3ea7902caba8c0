"""What the API server's schema refuses, or silently leaves out: versions, field names, texts and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from manifests.kinds import PYTORCHJOB, TRAINJOB
from manifests.lint.fields import (
    CONTAINER,
    ELASTIC,
    JOB,
    NEWER_CONTAINER,
    NEWER_POD,
    NUMBERS,
    POD,
    POD_NUMBERS,
    REPLICA,
    RUN_POLICY,
    SCHEDULING,
    TRAINER,
    trainjob_fields,
)
from manifests.lint.place import Place
from manifests.lint.registry import IGNORE_ANNOTATION, RULES, Hit, Severity, ignored, rule
from manifests.lint.subjects import AnyObject, Container, Pod, PyTorchJob, TrainJob

ERROR, WARNING = Severity.ERROR, Severity.WARNING
VERSIONS = {
    PYTORCHJOB.kind: PYTORCHJOB.api_version,
    TRAINJOB.kind: TRAINJOB.api_version,
    "TrainingRuntime": TRAINJOB.api_version,
    "ClusterTrainingRuntime": TRAINJOB.api_version,
}
RENAMED = {
    "podTemplateOverrides": "2.2 replaced it by runtimePatches",
    "podSpecOverrides": "2.1 replaced it by podTemplateOverrides, 2.2 by runtimePatches",
    "runtimePatches": "from 2.2; before, podTemplateOverrides",
    "activeDeadlineSeconds": "from 2.2; before, in the spec of the runtime's Job",
    "labels": "2.2 removed it; write them in runtimePatches",
    "annotations": "2.2 removed it; write them in runtimePatches",
}


@rule(
    "api-version",
    ERROR,
    AnyObject,
    why="No release that is still used serves any other version of the kind: 'no matches for kind'.",
    fix="Write apiVersion: kubeflow.org/v1 for a PyTorchJob, trainer.kubeflow.org/v1alpha1 for Trainer's kinds.",
)
def api_version(job: AnyObject) -> Iterator[Hit]:
    place = job.place["apiVersion"]
    if place.value != VERSIONS[job.kind]:
        yield Hit(place, f"{job.kind} of {place.value}")


@rule(
    "duplicate-key",
    ERROR,
    AnyObject,
    why="Of a key that is written twice in a mapping the last counts; kubectl and the API server say nothing.",
    fix="Keep one of them.",
)
def duplicate_key(job: AnyObject) -> Iterator[Hit]:
    for path in job.duplicates:
        yield Hit(Place(None, path), f"'{path[-1]}' is written twice")


@rule(
    "unknown-field",
    ERROR,
    PyTorchJob,
    why="kubectl's strict validation denies a field that the API does not know; other clients (SDKs, Argo, KFP) "
    "lose it silently, so that the default holds.",
    fix="Correct the name, or move it to where it belongs.",
)
def unknown_field(job: PyTorchJob) -> Iterator[Hit]:
    yield from _unknown(job.spec, JOB)
    yield from _unknown(job.run_policy, RUN_POLICY)
    yield from _unknown(job.run_policy["schedulingPolicy"], SCHEDULING)
    yield from _unknown(job.elastic, ELASTIC)
    for role in job.roles:
        yield from _unknown(role, REPLICA)


@rule(
    "unknown-pod-field",
    ERROR,
    Pod,
    why="kubectl's strict validation denies a field that the job's API does not know (newer ones of Kubernetes "
    "too, as resources of a whole pod); other clients lose it silently.",
    fix="Correct the name, or move it to where it belongs.",
)
def unknown_pod_field(pod: Pod) -> Iterator[Hit]:
    newer = pod.kind is TRAINJOB  # JobSet was built with a newer Kubernetes than the training operator
    yield from _unknown(pod.spec, POD | NEWER_POD if newer else POD)
    for container in pod.containers:
        yield from _unknown(container.place, CONTAINER | NEWER_CONTAINER if newer else CONTAINER)


@rule(
    "trainjob-unknown-field",
    ERROR,
    TrainJob,
    why="Each release of Trainer changed the TrainJob's fields. kubectl's strict validation denies one that the "
    "installed release does not know; other clients lose it silently.",
    fix="Write what the cluster's release knows; say which it is with --trainer-version.",
)
def trainjob_unknown_field(job: TrainJob) -> Iterator[Hit]:
    known = trainjob_fields(job.version)
    for name, place in job.spec.fields():
        if name not in known and name in RENAMED:
            yield Hit(place, f"'{name}' does not exist in Trainer {job.version} ({RENAMED[name]})")
    yield from _unknown(job.spec, known | RENAMED.keys())
    yield from _unknown(job.spec["trainer"], TRAINER)


@rule(
    "not-a-string",
    ERROR,
    AnyObject,
    why="The API server denies numbers and booleans where texts belong; unquoted, YAML makes one of 8, true, yes "
    "and on.",
    fix='Quote it: "8", "true".',
)
def not_a_string(job: AnyObject) -> Iterator[Hit]:
    yield from _not_texts(job.place["metadata"])
    process = job.place["spec"]["nprocPerNode"]
    if process and not isinstance(process.value, str):
        yield Hit(process, f"nprocPerNode is {_kind(process)}")
    for entry in job.place["spec"]["elasticPolicy"]["rdzvConf"].each():
        if entry["value"] and not isinstance(entry["value"].value, str):
            yield Hit(entry["value"], f"value of {entry['key'].text} is {_kind(entry['value'])}")


@rule(
    "env-not-a-string",
    ERROR,
    Container,
    why="The API server denies numbers and booleans where texts belong; unquoted, YAML makes one of 8, true, yes "
    "and on.",
    fix='Quote it: "8", "true".',
)
def env_not_a_string(container: Container) -> Iterator[Hit]:
    for entry in container.place["env"].each():
        if entry["value"] and not isinstance(entry["value"].value, str):
            yield Hit(entry["value"], f"{entry['name'].text} is {_kind(entry['value'])}")
    for key in ("command", "args"):
        for place in container.place[key].each():
            if place and not isinstance(place.value, str):
                yield Hit(place, f"an element of {key} is {_kind(place)}")


@rule(
    "pod-label-not-a-string",
    ERROR,
    Pod,
    why="The API server denies numbers and booleans as labels, annotations or node selectors; "
    "sidecar.istio.io/inject: false is the classic.",
    fix='Quote it: "false".',
)
def pod_label_not_a_string(pod: Pod) -> Iterator[Hit]:
    yield from _not_texts(pod.template["metadata"])
    yield from _not_texts(pod.spec, ("nodeSelector",))


@rule(
    "not-a-number",
    ERROR,
    AnyObject,
    why="The API server denies texts, fractions and booleans where whole numbers belong, a quoted number too.",
    fix="Write a whole number without quotes: 2.",
)
def not_a_number(job: AnyObject) -> Iterator[Hit]:
    yield from _not_numbers(job.place, NUMBERS)


@rule(
    "pod-not-a-number",
    ERROR,
    Pod,
    why="The API server denies texts, fractions and booleans where whole numbers belong; seconds take no unit, and "
    "users, groups and ports no name.",
    fix="Write a whole number without quotes: 60.",
)
def pod_not_a_number(pod: Pod) -> Iterator[Hit]:
    yield from _not_numbers(pod.template, POD_NUMBERS)


@rule(
    "unknown-ignore",
    WARNING,
    AnyObject,
    why="No rule has that name, so nothing is ignored.",
    fix="See `yaongi lint --rules`.",
)
def unknown_ignore(job: AnyObject) -> Iterator[Hit]:
    annotations = job.place["metadata"]["annotations"]
    for word in ignored(annotations):
        if word not in RULES:
            nearest = get_close_matches(word, RULES, 1)
            yield Hit(
                annotations[IGNORE_ANNOTATION], f"'{word}'" + (f"; did you mean '{nearest[0]}'?" if nearest else "")
            )


def _unknown(place: Place, known: frozenset[str] | set[str]) -> Iterator[Hit]:
    for name, inside in place.fields():
        if name in known:
            continue
        home = next((where for where, fields in _HOMES.items() if name in fields), None)
        nearest = get_close_matches(name, known, 1)
        hint = f"; it belongs to {home}" if home else f"; did you mean '{nearest[0]}'?" if nearest else ""
        yield Hit(inside, f"unknown field '{name}'{hint}")


_HOMES = {
    "spec": JOB,
    "spec.runPolicy": RUN_POLICY,
    "spec.elasticPolicy": ELASTIC,
    "the replica type": REPLICA,
    "the container": CONTAINER,
    "the pod's spec": POD,
}


def _not_texts(place: Place, keys: tuple[str, ...] = ("labels", "annotations")) -> Iterator[Hit]:
    for key in keys:
        for name, value in place[key].fields():
            if value and not isinstance(value.value, str):
                yield Hit(value, f"{name} is {_kind(value)}")


def _not_numbers(place: Place, known: dict[str, frozenset[str]]) -> Iterator[Hit]:
    for path, names in known.items():
        for inside in _at(place, path.split(".")):
            for name, value in inside.fields():
                if name in names and value and not _is_whole(value.value):
                    what = f"the text '{value.text}'" if isinstance(value.value, str) else _kind(value)
                    yield Hit(value, f"{name} is {what.replace('no text:', 'no number:')}")


def _at(place: Place, path: list[str]) -> Iterator[Place]:
    """Places at a path of names, where `*` is each entry of a list or mapping."""
    if not path:
        yield place
        return
    step, *rest = path
    entries = [*place.each(), *(entry for _, entry in place.fields())] if step == "*" else [place[step]]
    for entry in entries:
        yield from _at(entry, rest)


def _is_whole(value: object) -> bool:
    """Clients write 2.0 as 2."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _kind(place: Place) -> str:
    kind = {bool: "the boolean", int: "the number", float: "the number"}.get(type(place.value), "no text:")
    return f"{kind} {str(place.value).lower() if isinstance(place.value, bool) else place.value}"
