"""Queues, gangs and where pods go."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.kinds import KINDS, QUEUE_LABEL
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import AnyObject, Pod, PyTorchJob
from manifests.queue import PREFERRED_TOPOLOGY, PRIORITY_LABEL, REQUIRED_TOPOLOGY, TOPOLOGY_ANNOTATIONS

ERROR, WARNING = Severity.ERROR, Severity.WARNING


@rule(
    "gang-min-available",
    ERROR,
    PyTorchJob,
    why="The gang scheduler starts no pod before minAvailable of them fit. It is all replicas unless written, "
    "also for an elastic job, which then never starts small; more than there are never fit; fewer than "
    "minReplicas start for nothing.",
    fix="Write schedulingPolicy.minAvailable equal to elasticPolicy.minReplicas, or to the number of pods of a "
    "fixed size.",
)
def gang_min_available(job: PyTorchJob) -> Iterator[Hit]:
    policy = job.run_policy["schedulingPolicy"]
    if not policy:
        return
    written = policy["minAvailable"].number
    low = job.elastic["minReplicas"].number
    if written is None and low is not None and low < job.pod_count:
        yield Hit(policy, f"no minAvailable, so all {job.pod_count} pods, for a job of at least {low}")
    elif written is not None and written > job.pod_count:
        yield Hit(policy["minAvailable"], f"minAvailable {written} of {job.pod_count} pods")
    elif written is not None and low is not None and written < low:
        yield Hit(policy["minAvailable"], f"minAvailable {written} for a job of at least {low}")


@rule(
    "queue-label-place",
    ERROR,
    AnyObject,
    why="Kueue reads its queue from the job's labels. As an annotation it is not seen; on the pods it makes each "
    "of them a workload of its own, admitted one by one.",
    fix=f"Write {QUEUE_LABEL} in metadata.labels of the job, and nowhere else.",
)
def queue_label_place(job: AnyObject) -> Iterator[Hit]:
    misplaced = [job.place["metadata"]["annotations"][QUEUE_LABEL]]
    for role in ("Master", "Worker"):
        metadata = job.place["spec"]["pytorchReplicaSpecs"][role]["template"]["metadata"]
        misplaced += [metadata["labels"][QUEUE_LABEL], metadata["annotations"][QUEUE_LABEL]]
    for place in misplaced:
        if place:
            yield Hit(place, f"queue '{place.value}'")


@rule(
    "queue-label-missing",
    WARNING,
    AnyObject,
    why="Kueue reads the priority class and the topology only of jobs in a queue. Without the queue's label the job "
    "starts at once, outside every quota, and its pods go where the scheduler puts them, unless Kueue manages jobs "
    "without a queue too.",
    fix=f"Add the label {QUEUE_LABEL} with the name of a LocalQueue, or remove what only Kueue reads.",
)
def queue_label_missing(job: AnyObject) -> Iterator[Hit]:
    labels = job.place["metadata"]["labels"]
    if job.kind not in (kind.kind for kind in KINDS.values()) or labels[QUEUE_LABEL]:
        return
    if labels[PRIORITY_LABEL]:
        yield Hit(labels[PRIORITY_LABEL], f"priority class '{labels[PRIORITY_LABEL].value}' without a queue")
    for role in ("Master", "Worker"):
        annotations = job.place["spec"]["pytorchReplicaSpecs"][role]["template"]["metadata"]["annotations"]
        for name in TOPOLOGY_ANNOTATIONS:
            if annotations[name]:
                yield Hit(annotations[name], f"topology '{annotations[name].value}' without a queue")


@rule(
    "topology-twice",
    ERROR,
    Pod,
    why="Kueue's webhook refuses the job: a pod template may have one topology annotation.",
    fix=f"Keep {REQUIRED_TOPOLOGY} or {PREFERRED_TOPOLOGY}.",
)
def topology_twice(pod: Pod) -> Iterator[Hit]:
    annotations = pod.template["metadata"]["annotations"]
    if all(annotations[name] for name in TOPOLOGY_ANNOTATIONS):
        yield Hit(annotations[PREFERRED_TOPOLOGY], "both required and preferred")


@rule(
    "two-queues",
    ERROR,
    PyTorchJob,
    why="Kueue holds the job back until its own quota admits it, and then the gang scheduler's queue holds the "
    "pods: two quotas that know nothing of each other, and pods that wait while Kueue counts them as running.",
    fix="Keep the Kueue label, or schedulingPolicy.queue.",
)
def two_queues(job: PyTorchJob) -> Iterator[Hit]:
    place = job.run_policy["schedulingPolicy"]["queue"]
    if place and job.place["metadata"]["labels"][QUEUE_LABEL]:
        yield Hit(place, f"queue '{place.value}' beside Kueue's")


@rule(
    "elastic-autoscaler",
    WARNING,
    PyTorchJob,
    why="elasticPolicy.metrics makes a HorizontalPodAutoscaler that scales by load. Training loads always: it goes to "
    "maxReplicas at once, and every step of it restarts all workers from their last checkpoint.",
    fix="Remove metrics; change replicas when there are machines to use.",
)
def elastic_autoscaler(job: PyTorchJob) -> Iterator[Hit]:
    if job.elastic["metrics"].value:
        yield Hit(job.elastic["metrics"], "an autoscaler for the workers")


@rule(
    "node-name",
    WARNING,
    Pod,
    why="nodeName goes past the scheduler: all replicas land on one node, and a pod that does not fit there fails "
    "(OutOfcpu, UnexpectedAdmissionError) instead of waiting.",
    fix="Use nodeSelector or affinity.",
)
def node_name(pod: Pod) -> Iterator[Hit]:
    if pod.spec["nodeName"]:
        yield Hit(pod.spec["nodeName"], f"nodeName {pod.spec['nodeName'].value}")
