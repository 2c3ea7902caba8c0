"""The nodes' GPUs, and whether a job's pods fit on the nodes that it may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

from components.diagnose.explain import tolerates
from manifests.clusterspec import ClusterSpec
from manifests.kinds import Object
from manifests.lint.place import Place
from manifests.lint.subjects import ACCELERATOR
from pipelines.doctor.findings import Finding

PRODUCT = "nvidia.com/gpu.product"  # labels of NVIDIA's GPU feature discovery
DRIVER = ("nvidia.com/cuda.driver-version.full", "nvidia.com/cuda.driver.major")
GIB = 2**30
KEEPS_AWAY = ("NoSchedule", "NoExecute")


def gpus(nodes: list[Object]) -> Iterator[Finding]:
    """The number of GPUs of each kind and driver."""
    found: Counter[str] = Counter()
    for node in nodes:
        labels = node["metadata"].get("labels", {})
        count = int(
            sum((_amount(node, name) for name in _allocatable(node) if ACCELERATOR.fullmatch(name)), Decimal(0))
        )
        driver = next((labels[name] for name in DRIVER if name in labels), "unlabelled")
        if count:
            found[f"{labels.get(PRODUCT, 'GPU')}, driver {driver}"] += count
    if found:
        yield Finding("GPUs", "ok", "; ".join(f"{count} × {kind}" for kind, count in found.items()))
        return
    remedy = "install NVIDIA's GPU operator or device plugin on GPU nodes; without it only cluster.gpus_per_node 0 runs"
    yield Finding("GPUs", "missing", f"none allocatable (nodes: {len(nodes)})", remedy)


def fits(nodes: list[Object], cluster: ClusterSpec) -> Iterator[Finding]:
    """Whether all pods of the job would fit on the nodes that it may use if nothing else ran there."""
    each = {"cpu": Decimal(str(cluster.cpus_per_node)), "memory": Decimal(str(cluster.memory_gib_per_node)) * GIB}
    if cluster.gpus_per_node:
        each["nvidia.com/gpu"] = Decimal(cluster.gpus_per_node)
    wanted = f"{cluster.nodes} × ({cluster.cpus_per_node:g} CPUs, {cluster.memory_gib_per_node:g} GiB"
    wanted += f", GPUs: {cluster.gpus_per_node})" if cluster.gpus_per_node else ")"
    usable = [node for node in nodes if _usable(node, cluster)]
    room = sum(min(int(_amount(node, name) // amount) for name, amount in each.items()) for node in usable)
    if room >= cluster.nodes:
        detail = f"{wanted}: {room} fit on {len(usable)} of {len(nodes)} nodes (what others use is not counted)"
        yield Finding("capacity", "ok", detail)
        return
    short = {name for name, amount in each.items() if all(_amount(node, name) < amount for node in usable)}
    why = f"no usable node has enough {' or '.join(sorted(short))}" if short else f"only {room} fit"
    detail = f"{wanted}: {why} ({len(usable)} of {len(nodes)} nodes are ready, selected and tolerated)"
    remedy = "change cluster.nodes, gpus_per_node, cpus_per_node, memory_gib_per_node, node_selector or tolerations"
    yield Finding("capacity", "no", detail, remedy)


def _usable(node: Object, cluster: ClusterSpec) -> bool:
    labels, spec = node["metadata"].get("labels", {}), node.get("spec", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
    selected = cluster.node_selector.items() <= labels.items()
    taints = [taint for taint in spec.get("taints", []) if taint["effect"] in KEEPS_AWAY]
    return ready and selected and not spec.get("unschedulable") and all(_tolerated(taint, cluster) for taint in taints)


def _tolerated(taint: Object, cluster: ClusterSpec) -> bool:
    if taint["key"] == "nvidia.com/gpu" and cluster.gpus_per_node:
        return True  # the admission plugin ExtendedResourceToleration adds it where such taints are used
    return any(tolerates(each.model_dump(exclude_none=True), taint) for each in cluster.tolerations)


def _allocatable(node: Object) -> Object:
    return node["status"].get("allocatable", {})


def _amount(node: Object, name: str) -> Decimal:
    return Place(_allocatable(node).get(name)).quantity or Decimal(0)
