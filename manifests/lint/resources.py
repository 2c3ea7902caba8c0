"""CPUs, memory, GPUs, /dev/shm."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import ACCELERATOR, ClaimUse, Container, Pod

ERROR, WARNING = Severity.ERROR, Severity.WARNING
SHM = "/dev/shm"
LEAST_MEMORY_BYTES = 2**20


@rule(
    "gpu-limit",
    ERROR,
    Container,
    why="GPUs cannot be overcommitted or split: a request without an equal limit, or a fraction, makes the pod "
    "invalid. The job is accepted, has no pods and no status; only an event tells.",
    fix="Write whole GPUs in resources.limits; requests follow from it.",
)
def gpu_limit(container: Container) -> Iterator[Hit]:
    limits, requests = container.resources["limits"], container.resources["requests"]
    for name, amount in limits.fields():
        if ACCELERATOR.fullmatch(name) and (not amount or (amount.quantity or 0) % 1):
            yield Hit(amount, f"{name}: {amount.value if amount else 'nothing'}")
    for name, amount in requests.fields():
        unequal = amount.quantity is not None and limits[name].quantity != amount.quantity
        if ACCELERATOR.fullmatch(name) and unequal and not (limits[name] and limits[name].quantity is None):
            yield Hit(amount, f"{name}: requests {amount.value}, limits {limits[name].value or 'nothing'}")


@rule(
    "request-above-limit",
    ERROR,
    Container,
    why="The pod is invalid. The job is accepted, has no pods and no status; only an event tells.",
    fix="Keep each request at or below its limit.",
)
def request_above_limit(container: Container) -> Iterator[Hit]:
    for name, amount in container.resources["requests"].fields():
        limit = container.resources["limits"][name]
        if not ACCELERATOR.fullmatch(name) and amount.quantity and limit.quantity and amount.quantity > limit.quantity:
            yield Hit(amount, f"{name}: requests {amount.value}, limit {limit.value}")


@rule(
    "memory-unit",
    ERROR,
    Container,
    why="Memory is counted in bytes: 64 are 64 bytes, and 512m are half of one, m being a thousandth. No container "
    "starts with less than some MiB.",
    fix="Write the unit: 64Gi, 512Mi.",
)
def memory_unit(container: Container) -> Iterator[Hit]:
    for kind in ("requests", "limits"):
        amount = container.resources[kind]["memory"]
        if amount.quantity is not None and 0 < amount.quantity < LEAST_MEMORY_BYTES:
            yield Hit(amount, f"memory: {amount.value}")


@rule(
    "memory-limit",
    WARNING,
    Pod,
    why="Without a limit a leak takes the node down with it, and the kernel chooses whom to kill, other people's "
    "pods too; /dev/shm may grow to half of the node's memory.",
    fix="Write resources.limits.memory, and the same in requests.",
)
def memory_limit(pod: Pod) -> Iterator[Hit]:
    if pod.main and pod.is_whole and not pod.resources["limits"]["memory"]:
        yield Hit(pod.main.resources["limits"]["memory"], "no memory limit")


@rule(
    "dev-shm",
    ERROR,
    Pod,
    why="The container runtime's /dev/shm has 64 MiB. NCCL exchanges between GPUs of a node through it, and data "
    "loaders' workers too: 'Bus error', or 'unhandled system error' at the first collective.",
    fix="Mount an emptyDir with medium: Memory and a sizeLimit of some GiB at /dev/shm.",
)
def dev_shm(pod: Pod) -> Iterator[Hit]:
    several = max(pod.accelerators, pod.processes or 1)
    if pod.main and pod.accelerators and several > 1:
        mounts = {mount["mountPath"].text.rstrip("/"): mount for mount in pod.main.place["volumeMounts"].each()}
        if SHM not in mounts:
            yield Hit(pod.main.place["volumeMounts"], f"{several} GPUs or processes share 64 MiB at {SHM}")


@rule(
    "dev-shm-size",
    WARNING,
    Pod,
    why="A memory volume counts as memory of the pod. Without sizeLimit, or with one at the memory limit, filling "
    "it ends in exit 137 of a training process instead of an error that names it.",
    fix="Write a sizeLimit well below resources.limits.memory.",
)
def dev_shm_size(pod: Pod) -> Iterator[Hit]:
    for volume in pod.spec["volumes"].each():
        directory = volume["emptyDir"]
        if directory["medium"].text != "Memory":
            continue
        size = directory["sizeLimit"].quantity
        limit = pod.resources["limits"]["memory"].quantity
        if size is None:
            yield Hit(directory, "memory volume without sizeLimit")
        elif limit is not None and size >= limit:
            yield Hit(directory["sizeLimit"], f"{directory['sizeLimit'].value} of the pod's {limit / 2**30:.3g} GiB")


@rule(
    "claim-shared",
    ERROR,
    ClaimUse,
    why="A ReadWriteOnce volume can be mounted on one node: pods that land on another stay in ContainerCreating "
    "('Multi-Attach error') while the first waits for them; ReadWriteOncePod admits one pod in all.",
    fix="Make the claim ReadWriteMany (NFS, CephFS, Filestore, FSx, …).",
)
def claim_shared(use: ClaimUse) -> Iterator[Hit]:
    modes = [mode.text for mode in use.claim["spec"]["accessModes"].each()]
    if use.replicas > 1 and modes and not {"ReadWriteMany", "ReadOnlyMany"} & set(modes):
        name = use.claim["metadata"]["name"].text
        yield Hit(use.volume, f"{use.replicas} pods share the claim '{name}' of {', '.join(modes)}")
