"""Kueue: what a job in a queue (`cluster.queue`) carries, what Kueue writes into it, and the objects of a queue."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

from manifests.kinds import QUEUE_LABEL, Object

if TYPE_CHECKING:
    from manifests.clusterspec import ClusterSpec

GROUP = "kueue.x-k8s.io"
# What we read is the same in both; Kueue 0.17 calls v1beta1 deprecated, Kueues before 0.15 serve nothing else.
VERSIONS = ("v1beta2", "v1beta1")
VISIBILITY_GROUP = f"visibility.{GROUP}"
API = f"{GROUP}/{VERSIONS[0]}"
PRIORITY_LABEL = f"{GROUP}/priority-class"  # of the job; names a WorkloadPriorityClass
JOB_UID_LABEL = f"{GROUP}/job-uid"  # of Workloads
REQUIRED_TOPOLOGY = f"{GROUP}/podset-required-topology"  # annotations of pod templates
PREFERRED_TOPOLOGY = f"{GROUP}/podset-preferred-topology"
TOPOLOGY_ANNOTATIONS = (REQUIRED_TOPOLOGY, PREFERRED_TOPOLOGY)
MANAGER = f"{GROUP}/manager"  # of the runtimePatches that Kueue writes into TrainJobs
# What an admission changes in a pod template; the Workload has the originals.
ADMITTED_METADATA = ("labels", "annotations")
ADMITTED_SPEC = ("nodeSelector", "tolerations", "schedulingGates")


def version_of(served: Collection[str]) -> str | None:
    """The newest version that we know of those that a cluster serves; None if it serves only others."""
    return next((version for version in VERSIONS if version in served), None)


def job_labels(cluster: ClusterSpec) -> dict[str, str]:
    """Labels that put a job into its queue; they belong on the job itself, not on its pods."""
    found = {QUEUE_LABEL: cluster.queue, PRIORITY_LABEL: cluster.queue_priority}
    return {label: value for label, value in found.items() if value}


def topology_annotations(cluster: ClusterSpec) -> dict[str, str]:
    """Annotations of the pod template that ask Kueue to place all workers together."""
    topology = cluster.topology
    found = {REQUIRED_TOPOLOGY: topology.required, PREFERRED_TOPOLOGY: topology.preferred} if topology else {}
    return {name: level for name, level in found.items() if level}


def before_admission(job: Object, workload: Object | None) -> Object:
    """A copy of a job as it was created, without what Kueue wrote into it.

    An admission adds labels and the flavor's node selector and tolerations to the pod template. In a job that is
    created again they would bind it to that flavor for ever.

    Args:
        workload: its Workload; without it, node selector and tolerations cannot be told from the job's own, and stay.
    """
    job = without_patches(job)
    spec = job["spec"]
    for holder in (spec, spec.get("runPolicy", {})):
        holder.pop("suspend", None)
    originals = {each["name"]: each["template"] for each in (workload or {}).get("spec", {}).get("podSets", [])}
    for role, replica in spec.get("pytorchReplicaSpecs", {}).items():
        template = replica["template"]
        _restore(template.get("metadata", {}), originals.get(role.lower(), {}).get("metadata", {}), ADMITTED_METADATA)
        if role.lower() in originals:
            _restore(template["spec"], originals[role.lower()]["spec"], ADMITTED_SPEC)
    return job


def without_patches(job: Object) -> Object:
    """A copy of a job without the runtimePatches that Kueue writes into every TrainJob, also one without a queue: it
    writes them again, and a TrainJob with two of one manager is refused."""
    job = copy.deepcopy(job)
    others = [patch for patch in job["spec"].pop("runtimePatches", []) if patch.get("manager") != MANAGER]
    if others:
        job["spec"]["runtimePatches"] = others
    return job


def _restore(current: Object, original: Object, fields: tuple[str, ...]) -> None:
    """Give `current` the original's fields; of a map whose original is not known, only Kueue's keys are removed."""
    for field in fields:
        if field in original:
            current[field] = copy.deepcopy(original[field])
        elif field in ADMITTED_METADATA and field in current:
            own = (key for key in current[field] if key.startswith(f"{GROUP}/") and key not in TOPOLOGY_ANNOTATIONS)
            for key in list(own):
                del current[field][key]
        else:
            current.pop(field, None)


def local_queue(name: str, cluster_queue: str) -> Object:
    """The namespace's queue; jobs name it, its ClusterQueue has the quota."""
    return {
        "apiVersion": API,
        "kind": "LocalQueue",
        "metadata": {"name": name},
        "spec": {"clusterQueue": cluster_queue},
    }


def resource_flavor(name: str) -> Object:
    """The nodes of a quota; without labels all nodes."""
    return {"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": name}, "spec": {}}


def cluster_queue(name: str, flavor: str, quotas: dict[str, str]) -> Object:
    """One flavor with a quota for each resource, open to the LocalQueues of all namespaces."""
    resources = [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()]
    return {
        "apiVersion": API,
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {},
            "resourceGroups": [
                {"coveredResources": list(quotas), "flavors": [{"name": flavor, "resources": resources}]}
            ],
        },
    }
