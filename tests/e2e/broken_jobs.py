"""Jobs that cannot run, each for one reason, and the objects that they need or lack in their namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kube import Object
from launching import BUSYBOX, SHORT, scripted

from manifests.kinds import PYTORCHJOB, kind_of, pod_template
from manifests.spec import job_from

Change = Callable[[list[Object]], None]
SMALL = {"nodes": 1, "cpus_per_node": 0.02, "memory_gib_per_node": 0.03125, "shared_memory_gib": 0.015625}
EMPTY: list[Object] = [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {}}]


def broken(name: str, namespace: str, *changes: Change, **cluster: Any) -> list[Object]:
    """The objects of a job `name` whose worker sleeps, with only emptyDirs, after `changes`."""
    settings = {"cluster": {**SMALL, **SHORT, "namespace": namespace, **cluster}}
    objects = scripted(job_from({"preset": "tiny", "name": name}, settings), "sleep 3600", BUSYBOX)
    pod, container = parts(objects)
    pod["volumes"] = list(EMPTY)
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] in ("tmp", "shm")]
    *needs, job = objects
    objects = [need for need in needs if need["kind"] == "TrainingRuntime"] + [job]
    for change in changes:
        change(objects)
    for item in objects:
        item["metadata"]["name"] = name
    if kind_of(job) is not PYTORCHJOB:
        job["spec"]["runtimeRef"]["name"] = name
    return objects


def parts(objects: list[Object]) -> tuple[Object, Object]:
    """The pod spec of the worker, and its container."""
    pod = pod_template(objects)["spec"]
    return pod, pod["containers"][0]


def asking(resource: str, amount: str) -> Change:
    def change(objects: list[Object]) -> None:
        resources = parts(objects)[1]["resources"]
        resources["requests"][resource] = amount
        if resource != "cpu":
            resources["limits"][resource] = amount

    return change


def in_pod(**fields: Any) -> Change:
    return lambda objects: parts(objects)[0].update(fields)


def in_container(**fields: Any) -> Change:
    return lambda objects: parts(objects)[1].update(fields)


def in_policy(**fields: Any) -> Change:
    return lambda objects: objects[-1]["spec"]["runPolicy"].update(fields)


def in_spec(**fields: Any) -> Change:
    return lambda objects: objects[-1]["spec"].update(fields)


def shell(script: str) -> Change:
    return in_container(command=["sh", "-c", script])


def restarting(policy: str) -> Change:
    return lambda objects: objects[-1]["spec"]["pytorchReplicaSpecs"]["Worker"].update(restartPolicy=policy)


def claim(name: str) -> Change:
    return in_pod(volumes=[{"name": name, "persistentVolumeClaim": {"claimName": name}}, *EMPTY])


def secret(name: str) -> Change:
    reference = {"secretKeyRef": {"name": name, "key": "token"}}
    return in_container(env=[{"name": "TOKEN", "valueFrom": reference}])


def mounting(config_map: str) -> Change:
    def change(objects: list[Object]) -> None:
        pod, container = parts(objects)
        pod["volumes"] = [*EMPTY, {"name": "config", "configMap": {"name": config_map}}]
        container["volumeMounts"] = [{"name": "config", "mountPath": "/etc/config"}]

    return change


def apart(objects: list[Object]) -> None:
    """No two workers on a node."""
    labels = {"matchLabels": {"apart": "yes"}}
    template = pod_template(objects)
    template["metadata"]["labels"]["apart"] = "yes"
    rule = {"topologyKey": "kubernetes.io/hostname", "labelSelector": labels}
    template["spec"]["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [rule]}}


def surroundings(namespace: str) -> list[Object]:
    """The objects of the namespace; cluster-wide ones contain its name and must be deleted."""
    mine = {"kubernetes.io/metadata.name": namespace}

    def item(api: str, kind: str, name: str, **content: Any) -> Object:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **content}

    def of_class(name: str, storage_class: str, **spec: Any) -> Object:
        spec |= {"accessModes": ["ReadWriteOnce"], "storageClassName": storage_class}
        return item("v1", "PersistentVolumeClaim", name, spec=spec | {"resources": {"requests": {"storage": "1Gi"}}})

    zone = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["far"]}
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "",
        "local": {"path": "/nowhere"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [zone]}]}},
    }
    refused = "!object.metadata.name.startsWith('policy')"
    policy = {
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": mine},
            "resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
            ],
        },
        "validations": [{"expression": refused, "message": "pods must name a cost centre"}],
    }
    binding = {"policyName": namespace, "validationActions": ["Deny"]}
    admission = "admissionregistration.k8s.io/v1"
    # A node without a kubelet: pods on it never start.
    taint = {"key": "team", "value": "other", "effect": "NoSchedule"}
    node = item("v1", "Node", namespace, spec={"taints": [taint]})
    node["metadata"]["labels"] = {"node-of": namespace}
    return [
        item("v1", "ResourceQuota", "team", spec={"hard": {"requests.amd.com/gpu": "0"}}),
        item("v1", "Secret", "present", stringData={"other": "x"}),
        of_class("unbound", "absent"),
        of_class("later", namespace),
        of_class("far", "", volumeName=namespace),
        item("v1", "PersistentVolume", namespace, spec=volume),
        item(
            "storage.k8s.io/v1",
            "StorageClass",
            namespace,
            provisioner="kubernetes.io/no-provisioner",
            volumeBindingMode="WaitForFirstConsumer",
        ),
        item(admission, "ValidatingAdmissionPolicy", namespace, spec=policy),
        item(admission, "ValidatingAdmissionPolicyBinding", namespace, spec=binding),
        node,
    ]


CLUSTER_WIDE = (
    "validatingadmissionpolicybinding",
    "validatingadmissionpolicy",
    "storageclass",
    "node",
    "persistentvolume",
)
