"""What the API server's schema rejects or silently drops: versions, field names, strings and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from manifests.kinds import PYTORCHJOB, TRAINJOB
from manifests.lint.fields import kinds, own_groups, versions
from manifests.lint.place import Place
from manifests.lint.registry import IGNORE_ANNOTATION, RULES, Hit, Severity, ignored, rule
from manifests.lint.structure import Kind
from manifests.lint.subjects import AnyObject

ERROR, WARNING = Severity.ERROR, Severity.WARNING
JOBS = (PYTORCHJOB.kind, TRAINJOB.kind, "TrainingRuntime", "ClusterTrainingRuntime")
INVALID_POD = "The API server, or the validation of pods, refuses it: the job is denied, or has no pods and no status."


@rule(
    "api-version",
    ERROR,
    AnyObject,
    why="No release that is still used serves any other version of the kind: 'no matches for kind'.",
    fix="Write apiVersion: kubeflow.org/v1 for a PyTorchJob, trainer.kubeflow.org/v1alpha1 for Trainer's kinds, "
    "otherwise the one that serves it; kinds are spelled with their capitals.",
)
def api_version(object: AnyObject) -> Iterator[Hit]:
    place, kind = object.place["apiVersion"], object.kind
    written = str(place.value)
    group, serving = written.rpartition("/")[0], versions(kind)
    if written in serving:
        return
    if not serving:
        near = {other.lower(): other for other in kinds(written)}
        cutoff = 0.8 if group in own_groups() else 1.0  # other groups have kinds that we do not know
        found = get_close_matches(kind.lower(), near, 1, cutoff)
        if found:
            yield Hit(object.place["kind"], f"kind {kind} of {written}; did you mean {near[found[0]]}?")
    elif kind in JOBS or group in {version.rpartition("/")[0] for version in serving} or _is_settled(group, serving):
        yield Hit(place, f"{kind} of {written}; it is {', '.join(serving)}")


def _is_settled(group: str, serving: list[str]) -> bool:
    """Whether a kind of Kubernetes is stable, so that no later release serves another version."""
    return group in own_groups() and any(version.rpartition("/")[2][1:].isdigit() for version in serving)


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


def _structure(id: str, kind: Kind, *, why: str, fix: str) -> None:
    """Register a rule about the schema itself."""

    @rule(id, ERROR, AnyObject, why=why, fix=fix)
    def check(job: AnyObject) -> Iterator[Hit]:
        told = set()
        for problem in job.problems:
            # The same wrong quantity in requests and limits is one mistake.
            key = (problem.place.path[: -2 if kind == "quantity" else None], problem.what)
            if problem.kind == kind and key not in told:
                told.add(key)
                yield Hit(problem.place, problem.what)


_structure(
    "unknown-field",
    "unknown",
    why="kubectl's strict validation denies a field that the API does not know, newer ones of Kubernetes or of another "
    "release of Trainer too; other clients (SDKs, Argo, KFP) lose it silently, so that the default holds.",
    fix="Correct the name, or move it to where it belongs; say which Trainer it is for with --trainer-version.",
)


@rule(
    "not-filled-in",
    ERROR,
    AnyObject,
    why="A variable of a template stands where the API server wants a number, a quantity or a name: it denies the job.",
    fix="Fill the template in first (envsubst, helm template, kustomize), then lint what comes out.",
)
def not_filled_in(job: AnyObject) -> Iterator[Hit]:
    found = [problem for problem in job.problems if problem.kind == "template"]
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        yield Hit(found[0].place, found[0].what + more)


_structure(
    "missing-field",
    "missing",
    why="The API server denies an object without its required fields.",
    fix="Write it.",
)
_structure(
    "not-a-string",
    "string",
    why="The API server denies numbers and booleans where texts belong, labels, annotations and env too; unquoted, "
    "YAML makes one of 8, true, yes and on. sidecar.istio.io/inject: false is the classic.",
    fix='Quote it: "8", "true".',
)
_structure(
    "not-a-number",
    "number",
    why="The API server denies texts, fractions and booleans where whole numbers belong, a quoted number too; seconds "
    "take no unit, and users, groups and ports no name.",
    fix="Write a whole number without quotes: 60.",
)
_structure(
    "wrong-type",
    "type",
    why="The API server denies a text where a list belongs (command: python train.py), a mapping where a list of "
    "entries belongs (env: {A: b}), and the like.",
    fix="Write a list as [a, b] or with dashes, a mapping as key: value.",
)
_structure(
    "not-a-quantity",
    "quantity",
    why="Quantities are numbers, whole or with one of m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei directly behind: "
    "GB, gi and a space are denied.",
    fix="Write 64Gi, 500m, 8.",
)
_structure(
    "unknown-word",
    "word",
    why=INVALID_POD,
    fix="Use one of the words, spelled so.",
)
_structure(
    "out-of-range",
    "range",
    why=INVALID_POD,
    fix="Write a number within the range.",
)
_structure(
    "written-twice",
    "twice",
    why="Names of containers, volumes, replicated jobs and the like, paths of mounts and numbers of ports are unique. "
    + INVALID_POD,
    fix="Rename one of them, or remove it.",
)
_structure(
    "one-of",
    "one-of",
    why="A volume has one source, a variable a value or a source, a probe one way to ask. " + INVALID_POD,
    fix="Keep one of them.",
)
_structure(
    "bad-name",
    "name",
    why="Containers, volumes, ports, labels and resources have names of certain characters; a device's has a domain. "
    + INVALID_POD,
    fix="Correct the name.",
)


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
