"""The two kinds of job that run a task, and how their operators name the job's pods.

`pytorchjob` belongs to the training operator (v1): each worker is a pod that is recreated alone. `trainjob` belongs to
Kubeflow Trainer (v2): a JobSet of one indexed Job, whose pods are recreated together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Object = dict[str, Any]
JobKindName = Literal["pytorchjob", "trainjob"]


@dataclass(frozen=True)
class JobKind:
    """The properties of a kind of job for launchers, tests and tools.

    Attributes:
        operator: the software that provides this kind.
        container: name of the training container, prescribed by the operator.
        worker: the part between the job's name and the worker's index in the worker's host name.
        job_label, index_label: pod labels with the job's name and the worker's index.
        succeeded: condition of a successful job; that of a failed job is `Failed` in both kinds.
        attempt_label: pod label that counts restarts of all workers together; None where each restarts alone.
        needs: kinds of the objects that it needs, which have the job's name, in order of creation.
        children: kinds and names of the operator's objects between job and pods, to find events about them.
    """

    kind: str
    group: str
    version: str
    plural: str
    operator: str
    container: str
    worker: str
    job_label: str
    index_label: str
    succeeded: str
    attempt_label: str | None = None
    needs: tuple[str, ...] = ("ConfigMap", "NetworkPolicy")
    children: tuple[tuple[str, str], ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"

    def worker_name(self, job_name: str, index: int | str) -> str:
        """Host name of a worker; of a PyTorchJob also its pod's name."""
        return f"{job_name}-{self.worker}-{index}"

    def worker_of(self, pod: Object) -> str:
        labels = pod["metadata"]["labels"]
        return self.worker_name(labels[self.job_label], labels[self.index_label])

    def selector(self, job_name: str) -> str:
        """Label selector of the job's pods."""
        return f"{self.job_label}={job_name}"

    def child_name(self, kind: str, job_name: str) -> str | None:
        """Name of the job's child of another kind; None if it has none of that kind."""
        return next((name.format(job=job_name) for child, name in self.children if child == kind), None)


PYTORCHJOB = JobKind(
    kind="PyTorchJob",
    group="kubeflow.org",
    version="v1",
    plural="pytorchjobs",
    operator="the Kubeflow training operator 1.9",
    container="pytorch",
    worker="worker",
    job_label="training.kubeflow.org/job-name",
    index_label="training.kubeflow.org/replica-index",
    succeeded="Succeeded",
)
TRAINJOB = JobKind(
    kind="TrainJob",
    group="trainer.kubeflow.org",
    version="v1alpha1",
    plural="trainjobs",
    operator="Kubeflow Trainer 2.1 to 2.3",
    container="node",
    worker="node-0",
    job_label="jobset.sigs.k8s.io/jobset-name",
    index_label="batch.kubernetes.io/job-completion-index",
    succeeded="Complete",
    attempt_label="jobset.sigs.k8s.io/restart-attempt",
    needs=("ConfigMap", "NetworkPolicy", "TrainingRuntime"),
    children=(("JobSet", "{job}"), ("Job", "{job}-node-0")),
)


class Kind(NamedTuple):
    """A kind of object of the API server's own groups."""

    kind: str
    group: str
    version: str
    plural: str


# What a pod wants of each device class (DRA); Kubernetes 1.34 and newer. A job with `cluster.devices` needs one.
DEVICE_CLAIMS = Kind("ResourceClaimTemplate", "resource.k8s.io", "v1", "resourceclaimtemplates")
ANCESTOR_LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"  # marks the trainer among a runtime's jobs
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KINDS: Mapping[JobKindName, JobKind] = {"pytorchjob": PYTORCHJOB, "trainjob": TRAINJOB}
CONTAINERS = frozenset(kind.container for kind in KINDS.values())


def kind_of(job: Object) -> JobKind:
    """The kind of a job object, rendered or from the API server."""
    return next(kind for kind in KINDS.values() if kind.kind == job["kind"])


def workers(job: Object) -> int:
    """The number of a job's workers."""
    spec, is_trainjob = job["spec"], kind_of(job) is TRAINJOB
    return int(spec["trainer"]["numNodes"] if is_trainjob else spec["pytorchReplicaSpecs"]["Worker"]["replicas"])


def pod_template(objects: Iterable[Object]) -> Object:
    """The workers' pod template in the objects of one rendered job; not a copy, so changes affect the objects."""
    by_kind = {item["kind"]: item for item in objects}
    if "TrainingRuntime" in by_kind:
        (replicated_job,) = by_kind["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
        owner = replicated_job["template"]["spec"]
    else:
        owner = by_kind["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    template: Object = owner["template"]
    return template
