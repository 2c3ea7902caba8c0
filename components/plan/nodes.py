"""Which nodes the pods of a job may use, and how many of them fit there."""

from __future__ import annotations

from decimal import Decimal

from components.diagnose.explain import tolerates
from manifests.clusterspec import ClusterSpec
from manifests.kinds import Object
from manifests.lint.place import Place

KEEPS_AWAY = ("NoSchedule", "NoExecute")
BY_CLASS = "deviceclass.resource.kubernetes.io/"  # devices of a class, which nodes do not list


def usable(nodes: list[Object], cluster: ClusterSpec) -> list[Object]:
    """Those that are ready, selected and tolerated."""
    return [node for node in nodes if _is_usable(node, cluster)]


def pods_on(node: Object, requests: dict[str, Decimal]) -> int:
    """How many pods with these requests fit on a node on which nothing else runs."""
    return min(int(amount(node, name) // wanted) for name, wanted in _of_nodes(requests).items() if wanted)


def short_of(nodes: list[Object], requests: dict[str, Decimal]) -> list[str]:
    """The resources of which no node has enough for one pod."""
    of_nodes = _of_nodes(requests)
    return sorted(name for name, wanted in of_nodes.items() if all(amount(node, name) < wanted for node in nodes))


def amount(node: Object, name: str) -> Decimal:
    """What a node has of a resource for pods."""
    return Place(allocatable(node).get(name)).quantity or Decimal(0)


def allocatable(node: Object) -> Object:
    return node["status"].get("allocatable", {})


def _of_nodes(requests: dict[str, Decimal]) -> dict[str, Decimal]:
    return {name: wanted for name, wanted in requests.items() if not name.startswith(BY_CLASS)}


def _is_usable(node: Object, cluster: ClusterSpec) -> bool:
    labels, spec = node["metadata"].get("labels", {}), node.get("spec", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
    selected = cluster.node_selector.items() <= labels.items()
    taints = [taint for taint in spec.get("taints", []) if taint["effect"] in KEEPS_AWAY]
    return ready and selected and not spec.get("unschedulable") and all(_tolerated(taint, cluster) for taint in taints)


def _tolerated(taint: Object, cluster: ClusterSpec) -> bool:
    if cluster.queue is not None:
        return True  # the queue's flavor may bring tolerations, which only its administrator can read
    if taint["key"] in cluster.resources or (taint["key"] == "nvidia.com/gpu" and cluster.gpus_per_node):
        return True  # the admission plugin ExtendedResourceToleration adds it where such taints are used
    return any(tolerates(each.model_dump(exclude_none=True), taint) for each in cluster.tolerations)
