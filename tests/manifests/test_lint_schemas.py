"""The linter's checks by schemas: one error, with its place, for each violation, and none for valid manifests."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.lint import schemas, shape
from manifests.lint.check import Finding, lint
from manifests.lint.documents import read
from manifests.lint.fields import TRAINER_VERSIONS, Type, fields, is_custom, of_kind, versions
from manifests.lint.place import Path as Way
from manifests.lint.place import Place, path_text
from manifests.lint.registry import RULES
from manifests.lint.validation import NOT_NEEDED

FULL = {
    document.value["kind"]: document.value
    for document in read((Path(__file__).parent / "full.yaml").read_text(encoding="utf-8"), "full.yaml")
}
STRUCTURAL = {rule.id for rule in RULES.values() if rule.check.__module__ == shape.__name__}
TRAINER = "2.1"


def errors(object: dict[str, Any], version: str = TRAINER) -> list[Finding]:
    """Of its structure."""
    found = lint({"x": json.dumps(object)}, version).findings
    return [finding for finding in found if finding.rule in STRUCTURAL and finding.severity == "error"]


def changed(object: dict[str, Any], way: Way, value: Any = ...) -> dict[str, Any]:
    """The manifest with another value at a place, or without the value there."""
    object = copy.deepcopy(object)
    place: Any = object
    for step in way[:-1]:
        place = place[step]
    if value is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    return object


def steps(path: str) -> Way:
    return tuple(int(step) if step.isdigit() else step.replace("\0", ".") for step in path.split("."))


@pytest.mark.parametrize("kind", FULL)
def test_what_is_valid_gives_no_error(kind):
    assert errors(FULL[kind]) == []


TEMPLATE = "spec.pytorchReplicaSpecs.Worker.template"
POD = f"{TEMPLATE}.spec"
JOB_POD = "spec.template.spec.replicatedJobs.1.template.spec.template.spec"


@pytest.mark.parametrize(
    ("kind", "path", "value", "rule", "inside"),
    [
        ("PyTorchJob", "spec.runpolicy", {}, "unknown-field", ""),
        (
            "PyTorchJob",
            "spec.elasticPolicy.metrics",
            [{"type": "Resource", "resurce": {}}],
            "unknown-field",
            "[0].resurce",
        ),
        ("PyTorchJob", f"{POD}.affinity.nodeAffinity.required", [], "unknown-field", ""),
        ("PyTorchJob", f"{POD}.volumes.11.fresh", {}, "unknown-field", ""),
        ("PyTorchJob", f"{POD}.containers.0.readinessProbe.tcpSocket.prt", 5, "unknown-field", ""),
        # The API server knows these of the pods of Kubernetes 1.34, but PyTorchJob's are those of 1.31.
        ("PyTorchJob", f"{POD}.hostnameOverride", "a", "unknown-field", ""),
        ("PyTorchJob", f"{POD}.resources", {"limits": {"cpu": 1}}, "unknown-field", ""),
        ("PyTorchJob", f"{POD}.containers.0.lifecycle.stopSignal", "SIGUSR1", "unknown-field", ""),
        (
            "PyTorchJob",
            f"{TEMPLATE}.metadata.creationTimestamp",
            None,
            "unknown-field",
            "",
        ),
        ("PyTorchJob", f"{POD}.tolerations.0.tolerationSeconds", "60", "not-a-number", ""),
        ("PyTorchJob", f"{POD}.hostAliases.0.hostnames.0", 5, "not-a-string", ""),
        ("PyTorchJob", f"{POD}.volumes.9.projected.sources", {"secret": {}}, "wrong-type", ""),
        ("PyTorchJob", f"{POD}.containers.0.envFrom.1.secretRef.optional", "true", "wrong-type", ""),
        ("PyTorchJob", f"{POD}.containers.0.livenessProbe.httpGet.port", True, "wrong-type", ""),
        ("PyTorchJob", f"{POD}.containers.0.ports.1.protocol", "udp", "unknown-word", ""),
        ("PyTorchJob", f"{POD}.volumes.6.hostPath.type", "Folder", "unknown-word", ""),
        ("PyTorchJob", f"{POD}.topologySpreadConstraints.0.whenUnsatisfiable", "Never", "unknown-word", ""),
        ("PyTorchJob", f"{POD}.topologySpreadConstraints.0.topologyKey", ..., "missing-field", ""),
        ("PyTorchJob", f"{POD}.containers.0.lifecycle.postStart.httpGet.port", ..., "missing-field", ""),
        ("PyTorchJob", f"{POD}.volumes.0.persistentVolumeClaim", {}, "missing-field", ".claimName"),
        ("PyTorchJob", f"{POD}.volumes.4.emptyDir.sizeLimit", "8GB", "not-a-quantity", ""),
        ("PyTorchJob", f"{POD}.containers.0.resources.requests.cpu", 0.5, "not-a-quantity", ""),
        ("PyTorchJob", "spec.runPolicy.schedulingPolicy.minResources.memory", "1 Gi", "not-a-quantity", ""),
        ("PyTorchJob", "spec.runPolicy.backoffLimit", 2**31, "out-of-range", ""),
        ("PyTorchJob", f"{POD}.hostAliases", [{"ip": "10.0.0.1"}, {"ip": "10.0.0.1"}], "written-twice", "[1].ip"),
        ("PyTorchJob", "metadata.creationTimestamp", "yesterday", "wrong-type", ""),
        ("TrainJob", "spec.trainer.resourcesPerNode.limit", {}, "unknown-field", ""),
        ("TrainJob", "spec.podTemplateOverrides.0.spec.image", "a", "unknown-field", ""),
        ("TrainJob", "spec.podTemplateOverrides.0.targetJobs.0.name", ..., "missing-field", ""),
        ("TrainJob", "spec.trainer.numNodes", "2", "not-a-number", ""),
        ("TrainJob", "spec.initializer.dataset.env.0.value", 5, "not-a-string", ""),
        ("TrainJob", "spec.podTemplateOverrides.0.spec.tolerations.0.effect", "noSchedule", "unknown-word", ""),
        ("TrainingRuntime", "spec.mlPolicy.mpi", {"mpiImplementation": "MPICH"}, "unknown-word", ".mpiImplementation"),
        ("TrainingRuntime", "spec.template.spec.failurePolicy.rules.0.action", "Restart", "unknown-word", ""),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.1.dependsOn.0.status", ..., "missing-field", ""),
        ("TrainingRuntime", f"{JOB_POD}.containers.0.resources.claims.0.nme", "a", "unknown-field", ""),
        ("TrainingRuntime", "spec.mlPolicy.torch.numProcPerNode", "all", "bad-name", ""),
        ("ConfigMap", "data.level", 5, "not-a-string", ""),
        ("ConfigMap", "dta", {}, "unknown-field", ""),
        ("ConfigMap", "binaryData.blob", "no base64!", "wrong-type", ""),
        ("ConfigMap", "data.a b", "x", "bad-name", ""),
        ("ConfigMap", "metadata.name", "My_Config", "bad-name", ""),
        ("ConfigMap", "metadata.name", "$(name)", "not-filled-in", ""),
        ("Secret", "stringData.password", 8, "not-a-string", ""),
        ("Secret", "data.token", "hf_plain", "wrong-type", ""),
        ("PersistentVolumeClaim", "spec.accessMode", ["ReadWriteMany"], "unknown-field", ""),
        ("PersistentVolumeClaim", "spec.accessModes.0", "ReadWriteAll", "unknown-word", ""),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", "wrong-type", ""),
        ("PersistentVolumeClaim", "spec.resources.requests.storage", "1TB", "not-a-quantity", ""),
        ("PersistentVolumeClaim", "spec.resources.requests", ..., "missing-field", ".storage"),
        ("PersistentVolumeClaim", "spec.resources", {"request": {"storage": "1Gi"}}, "unknown-field", ".request"),
        ("PersistentVolumeClaim", "spec.resources.requests", {"storrage": "1Gi"}, "bad-name", ".storrage"),
        ("PersistentVolumeClaim", "spec.accessModes", ..., "missing-field", ""),
        ("Service", "spec.ports.0.port", "http", "not-a-number", ""),
        ("Service", "spec.ports.0.targetPort", "8080", "bad-name", ""),
        ("Service", "spec.ports.0.port", 70000, "out-of-range", ""),
        ("Service", "spec.ports.0.containerPort", 80, "unknown-field", ""),
        ("Service", "spec.type", "Loadbalancer", "unknown-word", ""),
        ("Service", "spec.selector.app", True, "not-a-string", ""),
        ("RoleBinding", "roleRef.kind", "ServiceAccount", "unknown-word", ""),
        ("RoleBinding", "subjects.0.kind", ..., "missing-field", ""),
        ("RoleBinding", "roleRef", ..., "missing-field", ""),
        ("RoleBinding", "subjects", {"kind": "User", "name": "me"}, "wrong-type", ""),
        ("Role", "rules.0.verb", ["get"], "unknown-field", ""),
        ("Job", "spec.template.spec.restartPolicy", ..., "unknown-word", ""),
        ("Job", "spec.template.spec.containers", [], "out-of-range", ""),
        ("Job", "spec.template.spec.containers.0.image", ..., "missing-field", ""),
        ("Job", "spec.template.spec.containers.0.resources.requests.memory", "1G B", "not-a-quantity", ""),
        ("Job", "spec.backoffLimit", "3", "not-a-number", ""),
        ("CronJob", "spec.schedule", "* * *", "bad-name", ""),
        ("CronJob", "spec.schedule", ..., "missing-field", ""),
        ("CronJob", "spec.jobTemplate.spec.template.spec.containers.0.env", {"A": "b"}, "wrong-type", ""),
        ("CronJob", "spec.concurrencyPolicy", "Never", "unknown-word", ""),
        ("Deployment", "spec.selector", ..., "missing-field", ""),
        ("Deployment", "spec.template.spec.containers.0.port", 80, "unknown-field", ""),
        ("Deployment", "spec.strategy.rollingUpdate.maxSurge", "25", "bad-name", ""),
        ("StatefulSet", "spec.volumeClaimTemplates.0.spec.resources.requests.storage", "1gi", "not-a-quantity", ""),
        ("NetworkPolicy", "spec.ingress.0.form", [], "unknown-field", ""),
        ("Ingress", "spec.rules.0.http.paths.0.pathType", ..., "missing-field", ""),
        ("HorizontalPodAutoscaler", "spec.maxReplicas", ..., "missing-field", ""),
        ("ClusterQueue", "spec.resourceGroups.0.flavors.0.resources.0.nominalQuota", ..., "missing-field", ""),
        ("ClusterQueue", "spec.queueingStrategy", "FIFO", "unknown-word", ""),
        ("LocalQueue", "spec.clusterqueue", "a", "unknown-field", ""),
        ("ResourceFlavor", "spec.nodeTaints.0.effect", ..., "missing-field", ""),
        ("PodMonitor", "spec.podMetricsEndpoints.0.interval", "15 s", "bad-name", ""),
        ("PodMonitor", "spec.podMetricsEndpoints.0.relabelings.0.action", "set", "unknown-word", ""),
        ("ServiceMonitor", "spec.endpoints", ..., "missing-field", ""),
        ("PrometheusRule", "spec.groups.0.rules.0.for", 5, "not-a-string", ""),
    ],
)
def test_one_mistake_is_one_error_at_its_place(kind, path, value, rule, inside):
    way = steps(path)
    (finding,) = errors(changed(FULL[kind], way, value))
    assert (finding.rule, finding.path) == (rule, path_text(way) + inside)


def of_schema(object: dict[str, Any]) -> Iterator[tuple[Way, Type]]:
    """All places of a manifest whose schema is known, with it."""
    root = of_kind(object["apiVersion"], object["kind"], TRAINER)
    todo: list[tuple[Way, Any, Type]] = [((), object, Type("object", root))]
    while todo:
        way, value, type_ = todo.pop()
        yield way, type_
        if isinstance(value, dict):
            known = fields(type_.name) if type_.name else dict.fromkeys(value, type_.of or Type("any"))
            todo += [((*way, key), inside, known[key]) for key, inside in value.items() if inside is not None]
        elif isinstance(value, list) and type_.of:
            todo += [((*way, n), inside, type_.of) for n, inside in enumerate(value)]


WRONG = {
    "string": (5, "not-a-string"), "bytes": (5, "not-a-string"), "time": (5, "not-a-string"),
    "int32": ("x", "not-a-number"), "int64": (1.5, "not-a-number"), "boolean": ("true", "wrong-type"),
    "quantity": ("64GB", "not-a-quantity"), "int-or-string": ([], "wrong-type"), "list": ("x", "wrong-type"),
    "mapping": ([], "wrong-type"), "object": ("x", "wrong-type"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FULL)
def test_every_object_refuses_unknown_fields_and_every_field_other_types(kind):
    good = FULL[kind]
    places = [(way, type_) for way, type_ in of_schema(good) if way and way[0] not in ("apiVersion", "kind", "status")]
    assert len(places) > 3
    for way, type_ in random.Random(0).sample(places, min(len(places), 40)):
        if type_.kind == "any":
            continue
        value, rule = WRONG[type_.kind]
        told = [(finding.rule, finding.path) for finding in errors(changed(good, way, value))]
        assert told == [(rule, path_text(way))], (way, value)
        if type_.kind == "object":
            told = [(finding.rule, finding.path) for finding in errors(changed(good, (*way, "zork"), 1))]
            assert told == [("unknown-field", path_text((*way, "zork")))], way


def says_kubernetes(object: dict[str, Any]) -> bool:
    """Whether the schemas of kubernetes-validate, which also derive from Kubernetes' own, refuse it."""
    by_default = "|".join(name.rpartition(".")[2] for name in NOT_NEEDED)  # the server itself fills these in
    try:
        kubernetes_validate.validate(object, schemas.KUBERNETES_RELEASE, strict=True)
    except kubernetes_validate.ValidationError as error:
        return not re.match(f"'({by_default})' is a required property", error.message)
    return False


OWN = [kind for kind, value in FULL.items() if not is_custom(of_kind(value["apiVersion"], kind, TRAINER))]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_kubernetes_schemas_refuse_is_an_error(data):
    object = FULL[data.draw(st.sampled_from([kind for kind in OWN if kind != "Namespace"]))]
    places = [way for way, _ in of_schema(object) if way and way[0] not in ("apiVersion", "kind", "metadata", "status")]
    way = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from([..., 5, 1.5, True, "x", [], {}, ["x"], [5], {"a": "b"}, {"zork": 1}]))
    broken = changed(object, way, value)
    assert errors(broken) or not says_kubernetes(broken), (object["kind"], way, value)


@pytest.mark.parametrize(
    "written", ["1e3", "100m", "1Gi", "+1", "1.", ".5", "12E", "1E3", "5u", "100n", "0", 0, 8, "1.5Ti"]
)
def test_quantities_are_those_of_kubernetes(written):
    changes = changed(FULL["Pod"], steps("spec.containers.0.resources.limits.cpu"), written)
    assert errors(changes) == []


@pytest.mark.parametrize("written", ["1e", "Ki", "1K", "64GB", "1 Gi", "0x1", "", "1e1.5", "--1", "1mi", "١", "1Gib"])
def test_what_is_no_quantity_is_told(written):
    (finding,) = errors(changed(FULL["Pod"], steps("spec.containers.0.resources.limits.cpu"), written))
    assert finding.rule == "not-a-quantity"


def test_a_fraction_is_a_quantity_in_pods_but_not_in_custom_resources():
    """The API server says so: int or string is all that those definitions allow."""
    pods = FULL["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": copy.deepcopy(pods)}
    pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = 0.5
    assert errors(pod) == []
    (finding,) = errors(changed(FULL["PyTorchJob"], steps(f"{POD}.containers.0.resources.requests.cpu"), 0.5))
    assert finding.rule == "not-a-quantity" and '"0.5"' in finding.what


@pytest.mark.parametrize(
    ("api_version", "kind", "rules"),
    [
        ("kubeflow.org/v1", "PytorchJob", ["api-version"]),
        ("apps/v1", "Deploymnet", ["api-version"]),
        ("extensions/v1beta1", "Deployment", ["api-version"]),
        ("batch/v1beta1", "CronJob", ["api-version"]),
        ("v1", "PodMonitor", ["api-version"]),
        ("monitoring.coreos.com/v1alpha1", "PodMonitor", ["api-version"]),
        ("serving.knative.dev/v1", "Service", []),
        ("batch.volcano.sh/v1alpha1", "Job", []),
        ("monitoring.coreos.com/v1", "Prometheus", []),
        ("kubeflow.org/v1", "MPIJob", []),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization", []),
        ("scheduling.k8s.io/v1alpha2", "PodGroup", []),
    ],
)
def test_kinds_of_others_are_passed_over_and_misspelt_ones_told(api_version, kind, rules):
    object = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "a"}, "spec": {"any": "thing"}}
    assert [finding.rule for finding in errors(object)] == rules


@pytest.mark.parametrize(("path", "value"), [("stringData.password", 12345678), ("data.token", "hf_$secret")])
def test_no_value_of_a_secret_is_shown(path, value):
    (finding,) = errors(changed(FULL["Secret"], steps(path), value))
    assert str(value) not in finding.what and path.rpartition(".")[2] in finding.what


@pytest.mark.parametrize(
    ("kind", "path", "hint"),
    [
        ("PyTorchJob", "spec.cleanPodPolicy", "it belongs to spec.runPolicy"),
        ("PyTorchJob", f"{POD}.containers.0.tolerations", f"it belongs to {path_text(steps(POD))}"),
        ("PyTorchJob", f"{POD}.command", f"it belongs to {path_text(steps(POD))}.containers"),
        ("PyTorchJob", f"{POD}.containers.0.volumeMount", "did you mean 'volumeMounts'?"),
        ("PyTorchJob", f"{POD}.containers.0.resources.request", "did you mean 'requests'?"),
        ("PyTorchJob", f"{POD}.containers.0.resources.cpu", "it belongs to limits or requests"),
        ("Deployment", "spec.selector.matchlabels", "did you mean 'matchLabels'?"),
        ("TrainingRuntime", "spec.mlPolicy.jax", "in 2.2, 2.3 it does"),
    ],
)
def test_a_hint_says_what_was_meant(kind, path, hint):
    (finding,) = errors(changed(FULL[kind], steps(path), {}))
    assert finding.rule == "unknown-field" and hint in finding.what


def test_the_kinds_of_trainer_are_known_for_each_release():
    names = {of_kind("trainer.kubeflow.org/v1alpha1", "TrainJob", version) for version in TRAINER_VERSIONS}
    assert len(names) == len(TRAINER_VERSIONS) and all(names)
    assert versions("ClusterQueue") == ["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]


def test_the_tables_are_read_only_when_asked_for():
    program = "import manifests.lint.check, manifests.lint.fields as f; print(f._tables.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "0\n"


CRD = """
spec:
  group: example.org
  names: {kind: Thing}
  versions:
  - name: v1
    schema:
      openAPIV3Schema:
        type: object
        properties:
          apiVersion: {type: string}
          kind: {type: string}
          metadata: {type: object}
          spec:
            type: object
            required: [size, mode, amount]
            properties:
              size: {type: integer, format: int32, minimum: 1, default: 1}
              mode: {type: string, enum: [a, b]}
              amount:
                anyOf: [{type: integer}, {type: string}]
                pattern: '^[numkMGTPE]?$'
                x-kubernetes-int-or-string: true
              free: {type: object, x-kubernetes-preserve-unknown-fields: true}
              closed: {type: object}
              tags: {type: object, additionalProperties: {type: string, maxLength: 5}}
              parts:
                type: array
                x-kubernetes-list-map-keys: [name]
                items: {type: object, required: [name], properties: {name: {type: string}}}
              tolerations:
                type: array
                items:
                  type: object
                  properties:
                    effect: {type: string}
                    key: {type: string}
                    operator: {type: string}
                    tolerationSeconds: {type: integer, format: int64}
                    value: {type: string}
"""


GO = """
// +enum
type Mode string
const (
\tA Mode = "a"
)

type Pod struct {
\tMode *Mode `json:"mode,omitempty"`
}
"""


def test_a_definition_of_a_custom_resource_becomes_lines_of_fields(tmp_path, monkeypatch):
    (tmp_path / "module" / "crds").mkdir(parents=True)
    (tmp_path / "module/crds/things.yaml").write_text(CRD)
    (tmp_path / "api/core/v1").mkdir(parents=True)
    (tmp_path / "api/core/v1/types.go").write_text(GO)
    monkeypatch.setattr(schemas, "SOURCES", {"module": ("crds", ("*",), "")})
    monkeypatch.setattr(schemas, "WORDS", "api")
    table = schemas.operators(tmp_path)
    assert table["kinds"] == {"example.org/v1 Thing": "Thing"}
    assert table["words"] == {"Pod.mode": ["a"]}
    assert table["types"]["ThingSpec"] == {
        "amount": "quantity!",
        "closed": "Closed",
        "free": "any",
        "mode": ["string!", {"enum": ["a", "b"]}],
        "parts": "[Part name]",
        "size": ["int32", {"minimum": 1}],
        "tags": ["{string}", {"items": {"maxLength": 5}}],
        "tolerations": "[Toleration]",
    }
    assert "Toleration" not in table["types"], "as Kubernetes has it"
    assert json.loads(schemas.text(table)) == table
    monkeypatch.setattr(schemas, "WORDS", "other")
    with pytest.raises(FileNotFoundError, match="go mod download other"):
        schemas.operators(tmp_path)


def test_places_of_the_tables_lead_to_tables():
    """Every object that a field names exists."""
    for kind, object in FULL.items():
        assert all(fields(type_.name) is not None for _, type_ in of_schema(object) if type_.name), kind
    assert Place({}).path == ()
