"""Kueue's objects for a queue that a job names in `cluster.queue`."""

from __future__ import annotations

from manifests.kinds import Object

API = "kueue.x-k8s.io/v1beta2"  # the fields we use are the same in v1beta1, which older Kueues serve


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
