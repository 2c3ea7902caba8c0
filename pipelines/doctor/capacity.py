"""The nodes' GPUs, and whether a job's pods fit on the nodes that it may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

from components.cluster.look import Look
from components.plan.nodes import allocatable, amount, pods_on, short_of, usable
from manifests.clusterspec import ClusterSpec
from manifests.kinds import DEVICE_CLAIMS, Object
from manifests.lint.place import Place
from manifests.lint.subjects import ACCELERATOR
from pipelines.doctor.findings import Finding

PRODUCT = "nvidia.com/gpu.product"  # labels of NVIDIA's GPU feature discovery
DRIVER = ("nvidia.com/cuda.driver-version.full", "nvidia.com/cuda.driver.major")
GIB = 2**30


def gpus(nodes: list[Object]) -> Iterator[Finding]:
    """The number of GPUs of each kind and driver."""
    found: Counter[str] = Counter()
    for node in nodes:
        labels = node["metadata"].get("labels", {})
        count = int(sum((amount(node, name) for name in allocatable(node) if ACCELERATOR.fullmatch(name)), Decimal(0)))
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
    for name, count in cluster.resources.items():
        each[name] = Place(str(count)).quantity or Decimal(0)
    wanted = f"{cluster.nodes} × ({cluster.cpus_per_node:g} CPUs, {cluster.memory_gib_per_node:g} GiB"
    wanted += f", GPUs: {cluster.gpus_per_node})" if cluster.gpus_per_node else ")"
    there = usable(nodes, cluster)
    room = sum(pods_on(node, each) for node in there)
    if room >= cluster.nodes:
        detail = f"{wanted}: {room} fit on {len(there)} of {len(nodes)} nodes (what others use is not counted)"
        yield Finding("capacity", "ok", detail)
        return
    short = short_of(there, each)
    why = f"no usable node has enough {' or '.join(short)}" if short else f"only {room} fit"
    detail = f"{wanted}: {why} ({len(there)} of {len(nodes)} nodes are ready, selected and tolerated)"
    changes = "nodes, gpus_per_node, cpus_per_node, memory_gib_per_node, resources, node_selector or tolerations"
    yield Finding("capacity", "no", detail, f"change cluster.{changes}")


def devices(look: Look, cluster: ClusterSpec) -> Iterator[Finding]:
    """Whether the cluster has the device classes of `cluster.devices`."""
    for name, count in cluster.devices.items():
        if look.get(f"/apis/{DEVICE_CLAIMS.group}/{DEVICE_CLAIMS.version}/deviceclasses/{name}"):
            yield Finding("device class", "ok", f"{count} of '{name}' for each pod")
        else:
            remedy = "kubectl get deviceclass lists them; their driver makes them, with Kubernetes 1.34 or newer"
            yield Finding("device class", "no", f"there is no '{name}'", remedy)
