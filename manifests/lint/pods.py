"""The parts of a training pod besides its process: containers, probes, ports, mounts, images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from manifests.kinds import PYTORCHJOB, TRAINJOB
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Container, Pod

ERROR, WARNING = Severity.ERROR, Severity.WARNING
RENDEZVOUS_PORTS = {PYTORCHJOB.kind: (23456, "pytorchjob-port"), TRAINJOB.kind: (29500, "")}
LONGEST_PORT_NAME = 15
ISTIO = "sidecar.istio.io/inject"


@rule(
    "extra-container",
    WARNING,
    Pod,
    why="A pod ends when all its containers have ended. A container beside the training container that keeps "
    "running leaves the pod, and so the job, Running forever after training has finished.",
    fix="Make it an init container with restartPolicy: Always, which ends with the others.",
)
def extra_container(pod: Pod) -> Iterator[Hit]:
    if pod.main is None:
        return
    for container in pod.spec["containers"].each():
        if container["name"].text != pod.main_name:
            yield Hit(container, f"container '{container['name'].text}' beside the training container")


@rule(
    "istio-sidecar",
    WARNING,
    Pod,
    why="In a namespace of a service mesh a proxy is put into every pod: it catches NCCL's and the rendezvous' "
    "connections, and unless it is a native sidecar it outlives the training, so that the job never finishes.",
    fix='Write the label or annotation sidecar.istio.io/inject: "false" on the pod template.',
)
def istio_sidecar(pod: Pod) -> Iterator[Hit]:
    metadata = pod.template["metadata"]
    said = [metadata[where][ISTIO].text for where in ("labels", "annotations")]
    if pod.main and "false" not in said:
        yield Hit(metadata, f'no {ISTIO}: "false"')


@rule(
    "liveness-probe",
    WARNING,
    Container,
    why="A liveness probe cannot tell a hang from a long compilation, collective or checkpoint, in which the "
    "process does not answer: the kubelet then kills a healthy rank, and with it the step of all others.",
    fix="Remove it; watch for hangs inside the process, or alert on its metrics.",
)
def liveness_probe(container: Container) -> Iterator[Hit]:
    if container.is_main and container.place["livenessProbe"]:
        yield Hit(container.place["livenessProbe"], "liveness probe of the training container")


@rule(
    "port-taken",
    ERROR,
    Pod,
    why="The operator adds the rendezvous port to container and service. A port of yours of the same number makes the "
    "service invalid, so that no worker is found by name; the job shows no status.",
    fix="Use another number, 9400 for metrics for instance.",
)
def port_taken(pod: Pod) -> Iterator[Hit]:
    number, name = RENDEZVOUS_PORTS[pod.kind.kind]
    for port in pod.main.place["ports"].each() if pod.main else ():
        if port["containerPort"].number == number and (not name or port["name"].text != name):
            yield Hit(port, f"port '{port['name'].text}' is {number}, the rendezvous' own")


@rule(
    "port-name",
    ERROR,
    Container,
    why="A port's name has at most 15 characters and is unique, else the pod is invalid. The job is accepted, has "
    "no pods and no status; only an event tells.",
    fix="Shorten the name.",
)
def port_name(container: Container) -> Iterator[Hit]:
    ports = list(container.place["ports"].each())
    times = Counter(port["name"].text for port in ports)
    for port in ports:
        name = port["name"].text
        if len(name) > LONGEST_PORT_NAME:
            yield Hit(port["name"], f"'{name}' has {len(name)} characters")
        elif name and times[name] > 1:
            yield Hit(port["name"], f"'{name}' is there {times[name]} times")


@rule(
    "metrics-ports",
    WARNING,
    Pod,
    why="Each process of a pod serves its own metrics, and a PodMonitor scrapes ports by name. With fewer metrics "
    "ports than processes the other ranks are not seen: no straggler, no fault of a GPU but the first.",
    fix="Give each local rank a port and a name: metrics-0: 9400, metrics-1: 9401, …",
)
def metrics_ports(pod: Pod) -> Iterator[Hit]:
    ports = pod.main.place["ports"] if pod.main else None
    named = [port for port in ports.each() if "metrics" in port["name"].text] if ports else []
    several = min(pod.processes or pod.accelerators, pod.accelerators or pod.processes or 0)
    if ports and named and len(named) < several:
        yield Hit(ports, f"{len(named)} metrics ports for {several} processes")


@rule(
    "mount-unknown",
    ERROR,
    Pod,
    why="A mount of a volume that the pod does not have makes it invalid. The job is accepted, has no pods and no "
    "status; only an event tells.",
    fix="Add the volume, or correct the name.",
)
def mount_unknown(pod: Pod) -> Iterator[Hit]:
    names = [volume["name"].text for volume in pod.spec["volumes"].each()] + [*pod.claimed]
    volumes = pod.spec["volumes"]
    if "" in names or (volumes and not isinstance(volumes.value, list)):  # covered by the rules of structure
        return
    for container in pod.containers:
        for mount in container.place["volumeMounts"].each():
            if mount["name"].text not in names:
                yield Hit(mount, f"'{mount['name'].text}' is none of the volumes {', '.join(names) or '(none)'}")


@rule(
    "image-tag",
    WARNING,
    Container,
    why="A moving tag, latest or none, is pulled again at every start: a worker that is recreated next week "
    "runs other code than its peers, and with pullPolicy IfNotPresent each node keeps its own version.",
    fix="Name a version, or better a digest (image@sha256:…).",
)
def image_tag(container: Container) -> Iterator[Hit]:
    image = container.place["image"]
    tag = image.text.rpartition("/")[2].partition(":")[2]
    if image.text and "@" not in image.text and "$(" not in image.text and tag in ("", "latest"):
        yield Hit(image, f"image '{image.text}'")


@rule(
    "image-pull-never",
    WARNING,
    Container,
    why="Never fails on every node that does not have the image: a recreated pod may land on one "
    "(ErrImageNeverPull), and the operator does not end the job for it.",
    fix="Use IfNotPresent.",
)
def image_pull_never(container: Container) -> Iterator[Hit]:
    if container.place["imagePullPolicy"].text == "Never":
        yield Hit(container.place["imagePullPolicy"], "imagePullPolicy Never")
