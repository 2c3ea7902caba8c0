"""Walk an object along its API's schema and say what the API server, or the validation of pods, refuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from manifests.lint.fields import known
from manifests.lint.place import Place
from manifests.lint.podschema import NEWER_MARK, Table

Kind = Literal[
    "unknown", "missing", "string", "number", "type", "quantity", "word", "range", "twice", "one-of", "name", "template"
]
MESSAGE_CHARACTERS = 60

# Texts of which only some are accepted; an empty one stands for the default.
_WORDS = {
    "Container.imagePullPolicy": "Always IfNotPresent Never",
    "Container.restartPolicy": "Always OnFailure Never",
    "Container.terminationMessagePolicy": "File FallbackToLogsOnError",
    "ContainerPort.protocol": "TCP UDP SCTP",
    "DependsOn.status": "Ready Complete",
    "FailurePolicy.restartStrategy": "Recreate BlockingRecreate",
    "FailurePolicyRule.action": "FailJobSet RestartJobSet RestartJobSetAndIgnoreMaxRestarts",
    "HTTPGetAction.scheme": "HTTP HTTPS",
    "JobSetSuccessPolicy.operator": "All Any",
    "JobSpec.completionMode": "NonIndexed Indexed",
    "JobSpec.podReplacementPolicy": "TerminatingOrFailed Failed",
    "LabelSelectorRequirement.operator": "In NotIn Exists DoesNotExist",
    "NodeSelectorRequirement.operator": "In NotIn Exists DoesNotExist Gt Lt",
    "PodFailurePolicyRule.action": "FailJob FailIndex Ignore Count",
    "PodFailurePolicyOnExitCodesRequirement.operator": "In NotIn",
    "PodOS.name": "linux windows",
    "PodSecurityContext.fsGroupChangePolicy": "OnRootMismatch Always",
    "PodSpec.dnsPolicy": "ClusterFirst ClusterFirstWithHostNet Default None",
    "PodSpec.preemptionPolicy": "PreemptLowerPriority Never",
    "SeccompProfile.type": "RuntimeDefault Localhost Unconfined",
    "StartupPolicy.startupPolicyOrder": "AnyOrder InOrder",
    "Toleration.effect": "NoSchedule PreferNoSchedule NoExecute",
    "Toleration.operator": "Exists Equal",
    "TopologySpreadConstraint.whenUnsatisfiable": "DoNotSchedule ScheduleAnyway",
    "VolumeMount.mountPropagation": "None HostToContainer Bidirectional",
}
_PORT, _ID, _MODE = (1, 65535), (0, 2**31 - 1), (0, 0o777)
_RANGES = {
    "ContainerPort.containerPort": _PORT,
    "ContainerPort.hostPort": (0, 65535),
    "ElasticPolicy.rdzvPort": _PORT,
    "JobSpec.backoffLimit": _ID,
    "JobSpec.parallelism": _ID,
    "JobSpec.ttlSecondsAfterFinished": _ID,
    "PodSecurityContext.fsGroup": _ID,
    "PodSecurityContext.runAsGroup": _ID,
    "PodSecurityContext.runAsUser": _ID,
    "PodSpec.activeDeadlineSeconds": (1, 2**31 - 1),
    "PodSpec.terminationGracePeriodSeconds": (0, 2**63 - 1),
    "PreferredSchedulingTerm.weight": (1, 100),
    "SecurityContext.runAsGroup": _ID,
    "SecurityContext.runAsUser": _ID,
    "TopologySpreadConstraint.maxSkew": (1, 2**31 - 1),
    "TrainJobSpec.activeDeadlineSeconds": (1, 2**63 - 1),
    "WeightedPodAffinityTerm.weight": (1, 100),
    **{f"{kind}VolumeSource.defaultMode": _MODE for kind in ("ConfigMap", "DownwardAPI", "Projected", "Secret")},
}
# Objects that are one of several things; "?" where none is fine too.
_HANDLERS = "exec grpc httpGet tcpSocket sleep"
_ONE_OF = {
    "EnvFromSource": "configMapRef secretRef",
    "EnvVar": "value valueFrom ?",
    "EnvVarSource": "configMapKeyRef fieldRef fileKeyRef resourceFieldRef secretKeyRef",
    "LifecycleHandler": _HANDLERS,
    "Probe": _HANDLERS,
    "Volume": "*",
    "VolumeProjection": "*",
}
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_NAMES = {
    "Container.name": (_LABEL, 63, "lower-case letters, digits and -"),
    "ContainerPort.name": (r"(?=.*[a-z])[a-z0-9](-?[a-z0-9])*", 2**31, "lower-case letters, digits and -"),
    "EmptyDirVolumeSource.medium": (r"Memory|HugePages(-.+)?|", 2**31, "Memory or HugePages"),
    "EnvVar.name": (r"[ -<>-~]+", 2**31, "printable ASCII without ="),
    "PersistentVolumeClaimVolumeSource.claimName": (
        rf"{_LABEL}(\.{_LABEL})*",
        253,
        "lower-case letters, digits, - and .",
    ),
    "ReplicatedJob.name": (_LABEL, 63, "lower-case letters, digits and -"),
    "Volume.name": (_LABEL, 63, "lower-case letters, digits and -"),
}
_LABEL_KEY = re.compile(rf"({_DOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABELS = ("ObjectMeta.labels", "PodSpec.nodeSelector", "LabelSelector.matchLabels")
_RESOURCE = re.compile(rf"cpu|memory|ephemeral-storage|storage|hugepages-.+|{_DOMAIN}/{_LABEL_KEY.pattern}")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|\{\{.*\}\}|<[A-Za-z][\w -]*>")  # of envsubst, Helm or a person
_GPUS = ("nvidia.com/gpu", "amd.com/gpu")
# Where a field belongs that stands elsewhere.
_HOMES = {
    "spec": "PyTorchJobSpec",
    "spec.runPolicy": "RunPolicy",
    "spec.elasticPolicy": "ElasticPolicy",
    "the replica type": "ReplicaSpec",
    "the container": "Container",
    "the pod's spec": "PodSpec",
    "the pod's securityContext": "PodSecurityContext",
    "the container's securityContext": "SecurityContext",
    "resources": "ResourceRequirements",
}
_RENAMED = {
    "podTemplateOverrides": "2.2 replaced it by runtimePatches",
    "podSpecOverrides": "2.1 replaced it by podTemplateOverrides, 2.2 by runtimePatches",
    "runtimePatches": "from 2.2; before, podTemplateOverrides",
    "activeDeadlineSeconds": "from 2.2; before, in the spec of the runtime's Job",
    "labels": "2.2 removed it; write them in runtimePatches",
    "annotations": "2.2 removed it; write them in runtimePatches",
    "numProcPerNode": "2.2 removed it; write it in the TrainJob's trainer",
    "elasticPolicy": "2.2 removed it",
    "volumeClaimPolicies": "from 2.2",
}
_VERSIONED = ("TrainJobSpec", "TorchPolicy", "JobSetSpec")


@dataclass(frozen=True)
class Problem:
    kind: Kind
    place: Place
    what: str


def problems(place: Place, kind: str, version: str) -> list[Problem]:
    """What is wrong with the structure of a PyTorchJob, a TrainJob or a runtime.

    Args:
        kind: of the object, `Runtime` for both kinds of runtime.
        version: of Kubeflow Trainer.
    """
    return list(_Walk(known(version), kind == "PyTorchJob", version).object(place, kind))


@dataclass(frozen=True)
class _Walk:
    table: Table
    is_older: bool  # built with the older Kubernetes
    version: str

    def object(self, place: Place, kind: str) -> Iterator[Problem]:
        fields = self.table[kind]
        known_names = [name for name, type_ in fields.items() if not (self.is_older and type_.endswith(NEWER_MARK))]
        unknown = [(name, inside) for name, inside in place.fields() if name not in known_names]
        if unknown:
            said = ", ".join(f"'{name}'{self._hint(name, kind, known_names)}" for name, _ in unknown)
            yield Problem("unknown", unknown[0][1], f"unknown field{'s' if unknown[1:] else ''} {said}")
        for name in known_names:
            type_ = fields[name].removesuffix(NEWER_MARK)
            if place[name]:
                yield from self.value(place[name], type_.removesuffix("!"), f"{kind}.{name}")
            elif type_.endswith("!") and not unknown:  # else it may only be misspelt
                yield Problem("missing", place[name], f"no {name}")
        if kind in ("PyTorchJob", "Runtime", "TrainJob"):
            name = place["metadata"]["name"]
            if not name and not place["metadata"]["generateName"]:
                yield Problem("missing", name, "no metadata.name")
            elif name.text and kind != "PyTorchJob" and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name.text):
                yield Problem("name", name, f"'{_cut(name.text)}' is not of lower-case letters, digits and -")
        if kind == "PodSpec":
            used = {container["name"].text for container in place["containers"].each()}
            for container in place["initContainers"].each():
                if container["name"].text in used:
                    what = f"name '{container['name'].text}' is there in initContainers and containers"
                    yield Problem("name", container["name"], what)
        if kind in _ONE_OF:
            yield from _one_of(place, kind, fields)

    def value(self, place: Place, type_: str, where: str) -> Iterator[Problem]:
        """Problems of what is there, for which a template that nobody has filled in is one reason."""
        found = self._value(place, type_, where)
        if isinstance(place.value, str) and _VARIABLE.search(place.value) and any(True for _ in found):
            yield Problem("template", place, f"{_name(place)} is still '{_cut(place.value)}'")
            return
        yield from self._value(place, type_, where)

    def _value(self, place: Place, type_: str, where: str) -> Iterator[Problem]:
        value, name = place.value, _name(place)
        if type_ == "any":
            return
        if type_ == "string":
            if not isinstance(value, str):
                yield Problem("string", place, f"{name} is {described(value)}")
            else:
                yield from _text(place, where)
        elif type_ == "integer":
            if not _is_whole(value):
                yield Problem("number", place, f"{name} is {described(value)}")
            elif where in _RANGES and not _RANGES[where][0] <= value <= _RANGES[where][1]:
                low, high = _RANGES[where]
                yield Problem("range", place, f"{name} {value} is outside of {low} to {high}")
        elif type_ == "boolean":
            if not isinstance(value, bool):
                yield Problem("type", place, f"{name} is {described(value)}, not true or false")
        elif type_ == "int-or-string":
            if not (isinstance(value, str) or _is_whole(value)):
                yield Problem("type", place, f"{name} is {described(value)}, not a number or text")
        elif type_ == "quantity":
            yield from _quantity(place)
        elif type_.startswith("["):
            yield from self._list(place, type_[1:-1].split(), where)
        elif not isinstance(value, dict):
            hint = "" if not isinstance(value, list) else "; remove the dash before its first field"
            yield Problem("type", place, f"{name} is {described(value)}, not a mapping{hint}")
        elif type_.startswith("{"):
            yield from self._mapping(place, type_[1:-1], where)
        else:
            yield from self.object(place, type_)

    def _list(self, place: Place, types: list[str], where: str) -> Iterator[Problem]:
        element, *keys = types
        if not isinstance(place.value, list):
            hint = "; each entry begins with a dash" if isinstance(place.value, dict) else ""
            yield Problem("type", place, f"{_name(place)} is {described(place.value)}, not a list{hint}")
            return
        seen: Counter[tuple[str, ...]] = Counter()
        for inside in place.each():
            if not inside:
                yield Problem("type", inside, f"an element of {_name(place)} is empty")
                continue
            yield from self.value(inside, element, where)
            key = tuple(str(inside[name].value or ("TCP" if name == "protocol" else "")) for name in keys)
            if keys and key[0] and element != "EnvVar":  # of which the rule duplicate-env speaks
                seen[key] += 1
                if seen[key] == 2:
                    yield Problem("twice", inside[keys[0]], f"{keys[0]} '{key[0]}' is there twice in {_name(place)}")

    def _mapping(self, place: Place, values: str, where: str) -> Iterator[Problem]:
        for name, inside in place.fields():
            if inside:
                yield from self.value(inside, values, "")
            if where.startswith("ResourceRequirements."):
                near = get_close_matches(name.lower(), _GPUS, 1, cutoff=0.85)
                if near and name != near[0] and not name.startswith((near[0] + ".", near[0] + "-")):
                    yield Problem("name", inside, f"resource '{name}'; did you mean '{near[0]}'?")
                elif not _RESOURCE.fullmatch(name):
                    hint = "; GPUs are nvidia.com/gpu" if "gpu" in name.lower() else ""
                    yield Problem("name", inside, f"'{name}' is no resource{hint}")
            elif where in _LABELS:
                if isinstance(inside.value, str) and _VARIABLE.search(inside.value):
                    yield Problem("template", inside, f"{name} is still '{_cut(inside.value)}'")
                elif not _LABEL_KEY.fullmatch(name):
                    yield Problem("name", inside, f"'{_cut(name)}' is no key of a label")
                elif isinstance(inside.value, str) and not _LABEL_VALUE.fullmatch(inside.value):
                    yield Problem("name", inside, f"'{_cut(inside.value)}' is no value of a label")

    def _hint(self, name: str, kind: str, names: list[str]) -> str:
        if kind in _VERSIONED and name in _RENAMED:
            return f" (in Trainer {self.version} it does not exist: {_RENAMED[name]})"
        if kind == "ResourceRequirements" and _RESOURCE.fullmatch(name):
            return " (it belongs to limits or requests)"
        homes = list(_HOMES.items())[0 if self.is_older else 4 :] if kind != "Trainer" else []
        home = next((where for where, of in homes if name in self.table[of] and of != kind), None)
        if home:
            return f" (it belongs to {home})"
        by_lower = {known.lower(): known for known in names}
        nearest = get_close_matches(name.lower(), by_lower, 1)
        return f" (did you mean '{by_lower[nearest[0]]}'?)" if nearest else ""


def _text(place: Place, where: str) -> Iterator[Problem]:
    words = _WORDS.get(where, "").split()
    if words and place.text and place.text not in words:
        yield Problem("word", place, f"{_name(place)} '{_cut(place.text)}' is none of {', '.join(words)}")
    if where in _NAMES:
        pattern, longest, allowed = _NAMES[where]
        if not re.fullmatch(pattern, place.text) or len(place.text) > longest:
            said = f" of at most {longest} characters" if longest < 2**31 else ""
            yield Problem("name", place, f"{_name(place)} '{_cut(place.text)}' is not of {allowed}{said}")


def _quantity(place: Place) -> Iterator[Problem]:
    written = place.value
    if place.quantity is not None:
        return
    text = str(written)
    if text.startswith("-") and Place(text[1:]).quantity is not None:
        yield Problem("range", place, f"{_name(place)}: {text} is below 0")
        return
    hint = ""
    if isinstance(written, str) and (found := re.fullmatch(r"([0-9.]+)\s*([kmgtpe])i?b?", written.strip().lower())):
        hint = f"; did you mean {found[1]}{found[2].upper()}i?"
    yield Problem("quantity", place, f"{_name(place)}: {described(written)} is no quantity{hint}")


def _one_of(place: Place, kind: str, fields: dict[str, str]) -> Iterator[Problem]:
    several = [name for name in fields if name != "name"] if _ONE_OF[kind] == "*" else _ONE_OF[kind].split()
    there = [name for name in several if place[name] and place[name].value != ""]
    if len(there) > 1:
        yield Problem("one-of", place[there[1]], f"{' and '.join(there)} exclude each other")
    elif not there and "?" not in several and isinstance(place.value, dict):
        empty = next((name for name in several if name in place), None)
        what = f"{empty} is empty; write {empty}: {{}}" if empty else f"none of {', '.join(several[:8])}"
        if not any(name not in fields for name in place.value):  # then that is told, and this may follow from it
            yield Problem("one-of", place, f"{kind} of nothing: {what}")


def described(value: object) -> str:
    """A value that has the wrong type, in words."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{_cut(value)}'"
    return "a list" if isinstance(value, list) else "a mapping"


def _name(place: Place) -> str:
    """The last name on the way."""
    named = next((step for step in reversed(place.path) if isinstance(step, str)), "it")
    return f"an element of {named}" if place.path and isinstance(place.path[-1], int) else named


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"


def _is_whole(value: object) -> bool:
    """Clients write 2.0 as 2."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
