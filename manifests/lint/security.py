"""The Pod Security Standards, field by field (kubernetes.io, "Pod Security Standards"), and a few stricter rules.

A violation of the baseline standard is an error, of only the restricted one a warning.
"""

from __future__ import annotations

from collections.abc import Iterator

from manifests.lint.place import Place
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Pod

ERROR, WARNING = Severity.ERROR, Severity.WARNING
REJECTED = "In a namespace that enforces restricted Pod Security no pod can be created; the job shows no status."
REJECTED_BY_BASELINE = "In a namespace that enforces baseline or restricted Pod Security no pod can be created."
RESTRICTED_VOLUMES = frozenset(
    ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
)


def _own_or_pods(pod: Pod, container: Place, field: str) -> Place:
    """A container's setting, else the pod's."""
    own = container["securityContext"][field]
    return own if own else pod.spec["securityContext"][field]


@rule(
    "host-namespace",
    ERROR,
    Pod,
    why=REJECTED_BY_BASELINE + " On the host's network two workers of a node also fight for the rendezvous port.",
    fix="Remove it; for RDMA give the pod a device and a network attachment.",
)
def host_namespace(pod: Pod) -> Iterator[Hit]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec[name].value is True:
            yield Hit(pod.spec[name], f"{name}: true")


@rule(
    "privileged",
    ERROR,
    Pod,
    why=REJECTED_BY_BASELINE + " Elsewhere it owns the node. The GPU needs none of it: the device plugin hands it in.",
    fix="Remove privileged; add the one capability that is needed, if any.",
)
def privileged(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        place = container.place["securityContext"]["privileged"]
        if place.value is True:
            yield Hit(place, f"container '{container.name}' is privileged")


@rule(
    "host-port",
    ERROR,
    Pod,
    why=REJECTED_BY_BASELINE + " Elsewhere only one such pod fits on a node.",
    fix="Remove hostPort; Prometheus scrapes the pod's own address.",
)
def host_port(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        for port in container.place["ports"].each():
            if port["hostPort"].value:
                yield Hit(port["hostPort"], f"hostPort {port['hostPort'].value}")


@rule(
    "volume-type",
    ERROR,
    Pod,
    why="hostPath is forbidden by baseline Pod Security, other types that are not listed by restricted; and what "
    "lies on a node's path is not there on the next node.",
    fix="Use a claim, or for scratch space and /dev/shm an emptyDir.",
)
def volume_type(pod: Pod) -> Iterator[Hit]:
    for volume in pod.spec["volumes"].each():
        for kind, place in volume.fields():
            if kind != "name" and kind not in RESTRICTED_VOLUMES:
                yield Hit(place, f"volume '{volume['name'].text}' is a {kind}")


@rule(
    "run-as-non-root",
    WARNING,
    Pod,
    why=REJECTED,
    fix="Write runAsNonRoot: true in the pod's securityContext, and a user other than 0.",
)
def run_as_non_root(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        user = _own_or_pods(pod, container.place, "runAsUser")
        if user.number == 0:
            yield Hit(user, f"container '{container.name}' runs as user 0")
        elif _own_or_pods(pod, container.place, "runAsNonRoot").value is not True:
            yield Hit(container.place["securityContext"]["runAsNonRoot"], f"container '{container.name}' may be root")


@rule(
    "run-as-user",
    WARNING,
    Pod,
    why="With runAsNonRoot the kubelet must know the number of the user. An image that names its user by a word, "
    "or has none, gives CreateContainerConfigError, and the job waits.",
    fix="Write a numeric runAsUser in the pod's securityContext, and fsGroup for the volumes.",
)
def run_as_user(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        asked = _own_or_pods(pod, container.place, "runAsNonRoot").value is True
        if asked and not _own_or_pods(pod, container.place, "runAsUser"):
            yield Hit(container.place["securityContext"]["runAsUser"], f"container '{container.name}' names no user")


@rule(
    "privilege-escalation",
    WARNING,
    Pod,
    why=REJECTED,
    fix="Write allowPrivilegeEscalation: false in the container's securityContext.",
)
def privilege_escalation(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        place = container.place["securityContext"]["allowPrivilegeEscalation"]
        if place.value is not False:
            yield Hit(place, f"container '{container.name}' may gain privileges")


@rule(
    "capabilities",
    WARNING,
    Pod,
    why=REJECTED,
    fix="Write capabilities: {drop: [ALL]} in the container's securityContext, and add none but NET_BIND_SERVICE.",
)
def capabilities(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        place = container.place["securityContext"]["capabilities"]
        if "ALL" not in [capability.text for capability in place["drop"].each()]:
            yield Hit(place["drop"], f"container '{container.name}' keeps its default capabilities")
        for capability in place["add"].each():
            if capability.text != "NET_BIND_SERVICE":
                yield Hit(capability, f"container '{container.name}' adds {capability.text}")


@rule(
    "seccomp",
    WARNING,
    Pod,
    why=REJECTED,
    fix="Write seccompProfile: {type: RuntimeDefault} in the pod's securityContext.",
)
def seccomp(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        kind = _own_or_pods(pod, container.place, "seccompProfile")["type"]
        if kind.text not in ("RuntimeDefault", "Localhost"):
            yield Hit(kind, f"container '{container.name}' has seccomp profile {kind.value or 'Unconfined by default'}")


@rule(
    "writable-root",
    WARNING,
    Pod,
    why="What a process writes to the container's own file system is lost with the pod and fills the node's disk, for "
    "which the kubelet evicts pods; an intruder can change the code that runs next.",
    fix="Write readOnlyRootFilesystem: true and mount an emptyDir with a sizeLimit at /tmp, for caches too.",
)
def writable_root(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        place = container.place["securityContext"]["readOnlyRootFilesystem"]
        if place.value is not True:
            yield Hit(place, f"container '{container.name}' has a writable root")


@rule(
    "service-account-token",
    WARNING,
    Pod,
    why="Every library that the training imports can act as the pod's service account: in Kubeflow's namespaces the "
    "default one may often edit jobs.",
    fix="Write automountServiceAccountToken: false in the pod's spec.",
)
def service_account_token(pod: Pod) -> Iterator[Hit]:
    place = pod.spec["automountServiceAccountToken"]
    if pod.main and place.value is not False:
        yield Hit(place, "the service account's token is mounted")
