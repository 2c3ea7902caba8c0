"""Kubeflow Trainer (v2): the fields of a TrainJob depend on its version, their effect on its runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.kinds import ANCESTOR_LABEL, TRAINJOB
from manifests.lint.place import Place
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Runtime, TrainJob
from manifests.lint.validation import DOMAIN
from manifests.names import DNS_LABEL_CHARACTERS, POD_SUFFIX_CHARACTERS

ERROR, WARNING = Severity.ERROR, Severity.WARNING
# Checked by the webhook of a torch runtime (pkg/constants of Trainer 2.1 and 2.3).
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
# What IsDomainPrefixedPath of Kubernetes' apimachinery takes.
MANAGER = re.compile(rf"{DOMAIN}/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+")
RUNTIME_KINDS = ("TrainingRuntime", "ClusterTrainingRuntime")


@rule(
    "trainjob-runtime-ref",
    ERROR,
    TrainJob,
    why="The API server denies a TrainJob without runtimeRef.name, the webhook one of another kind of runtime.",
    fix="Write spec.runtimeRef with name and kind: TrainingRuntime (of the namespace) or ClusterTrainingRuntime.",
)
def trainjob_runtime_ref(job: TrainJob) -> Iterator[Hit]:
    reference = job.spec["runtimeRef"]
    if not reference["name"].text:
        yield Hit(reference, "no runtime is named")
    elif reference["kind"] and reference["kind"].text not in RUNTIME_KINDS:
        yield Hit(reference["kind"], f"kind '{reference['kind'].value}'")


@rule(
    "trainjob-runtime-scope",
    ERROR,
    TrainJob,
    why="Without a kind the runtime is looked for among the cluster's, not in the namespace; the webhook denies "
    "the job because it finds none of that name.",
    fix="Write kind: TrainingRuntime in runtimeRef.",
)
def trainjob_runtime_scope(job: TrainJob) -> Iterator[Hit]:
    reference = job.spec["runtimeRef"]
    if reference["name"].text in job.other_scope and reference["kind"].value in (None, *RUNTIME_KINDS):
        kind = reference["kind"].text or "no kind"
        yield Hit(reference, f"{kind} for '{reference['name'].text}', which is defined here in the other scope")


@rule(
    "trainjob-name",
    ERROR,
    TrainJob,
    why="Pods are called <name>-node-0-<n>, within 63 characters. The API accepts longer names; then the JobSet "
    "is denied, which only an event tells: the TrainJob has no status.",
    fix="Shorten metadata.name.",
)
def trainjob_name(job: TrainJob) -> Iterator[Hit]:
    place = job.place["metadata"]["name"]
    worker = TRAINJOB.worker_name(place.text, max(0, (job.nodes or 1) - 1))
    over = len(worker) + POD_SUFFIX_CHARACTERS - DNS_LABEL_CHARACTERS
    if over > 0:
        yield Hit(place, f"pods called '{worker}-…' are too long by {over}")


@rule(
    "trainjob-num-nodes",
    ERROR,
    TrainJob,
    why="numNodes 0 is accepted, and the job is Complete at once, without a single pod; below 0 it has no pods "
    "and no end.",
    fix="Write numNodes of 1 or more.",
)
def trainjob_num_nodes(job: TrainJob) -> Iterator[Hit]:
    if job.nodes is not None and job.nodes < 1:
        yield Hit(job.spec["trainer"]["numNodes"], f"numNodes {job.nodes}")


@rule(
    "trainjob-num-proc",
    ERROR,
    TrainJob,
    why="Before 2.2 the webhook takes a number, auto, cpu or gpu, and accepts 0; from 2.2 on the field is a "
    "number, and 0 and below are accepted too. torchrun then ends with an AssertionError.",
    fix="Write the number of GPUs of a node.",
)
def trainjob_num_proc(job: TrainJob) -> Iterator[Hit]:
    place = job.spec["trainer"]["numProcPerNode"]
    words = ("auto", "cpu", "gpu") if job.before("2.2") else ()
    if place and place.text not in words and (place.number is None or place.number < 1):
        yield Hit(place, f"numProcPerNode {place.value!r}")


@rule(
    "trainjob-nproc-not-gpus",
    ERROR,
    TrainJob,
    why="torchrun starts as many processes as are written. Two on one GPU end in NCCL's 'Duplicate GPU detected'; "
    "fewer than GPUs leave the rest idle, but allocated.",
    fix="Make numProcPerNode equal to the GPUs of resourcesPerNode.limits, or leave it to the runtime's auto.",
)
def trainjob_nproc_not_gpus(job: TrainJob) -> Iterator[Hit]:
    if any(launch.number("nproc_per_node") is not None for start in job.starts for launch in start.launches):
        return  # that counts
    if job.accelerators and job.processes and job.processes != job.accelerators:
        place = job.spec["trainer"]["numProcPerNode"]
        yield Hit(place, f"{job.processes} processes for {job.accelerators} GPUs")


@rule(
    "trainjob-reserved-env",
    ERROR,
    TrainJob,
    why="A torch runtime sets these itself, and the webhook denies the job; in Trainer 2.1 only with numProcPerNode "
    "written, while without it the values are silently replaced.",
    fix="Remove them: numNodes and numProcPerNode say the same.",
)
def trainjob_reserved_env(job: TrainJob) -> Iterator[Hit]:
    for entry in job.spec["trainer"]["env"].each():
        if entry["name"].text in RESERVED:
            yield Hit(entry["name"], f"{entry['name'].text} is set")


@rule(
    "trainjob-override-env",
    ERROR,
    TrainJob,
    why="The webhook denies podTemplateOverrides and runtimePatches with env for the containers node, "
    "dataset-initializer and model-initializer.",
    fix="Write them in spec.trainer.env or spec.initializer.*.env.",
)
def trainjob_override_env(job: TrainJob) -> Iterator[Hit]:
    for _, pod in job.overrides():
        for container in pod["containers"].each():
            owned = container["name"].text in (TRAINJOB.container, "dataset-initializer", "model-initializer")
            if owned and container["env"].value:
                yield Hit(container["env"], f"env of container '{container['name'].text}'")


@rule(
    "trainjob-unknown-override",
    ERROR,
    TrainJob,
    why="The webhook of Trainer 2.1 denies an override of a replicated job that the runtime does not have. 2.3 accepts "
    "such a patch and adds a job without an image, so that no pod can be made: the TrainJob has no status, only an "
    "event of its JobSet tells.",
    fix="Use the names of the runtime's replicatedJobs in targetJobs or runtimePatches.",
)
def trainjob_unknown_override(job: TrainJob) -> Iterator[Hit]:
    known = _runtime_pods(job)
    for target, _ in job.overrides() if job.runtime else ():
        if target["name"].text not in known:
            yield Hit(target["name"], f"'{target['name'].text}' is none of {', '.join(sorted(known)) or 'no jobs'}")


@rule(
    "trainjob-unknown-container",
    ERROR,
    TrainJob,
    why="An override of a container that the runtime does not have is accepted and adds a container without an image, "
    "so that no pod can be made: the TrainJob has no status, only an event of its JobSet tells.",
    fix="Use the names of the containers in the runtime's pods; another container belongs into the runtime.",
)
def trainjob_unknown_container(job: TrainJob) -> Iterator[Hit]:
    pods = _runtime_pods(job)
    for target, changes in job.overrides():
        if (pod := pods.get(target["name"].text)) is None:
            continue  # covered by trainjob-unknown-override
        for kind in ("initContainers", "containers"):
            known = [container["name"].text for container in pod[kind].each()]
            for container in changes[kind].each():
                if (name := container["name"].text) and name not in known:
                    yield Hit(
                        container["name"], f"'{name}' is none of the {kind}: {', '.join(known) or 'there are none'}"
                    )


def _runtime_pods(job: TrainJob) -> dict[str, Place]:
    """The specs of the runtime's pods by replicated job; {} if the runtime is not in the input."""
    found = job.runtime.replicated_jobs() if job.runtime else ()
    return {entry["name"].text: entry["template"]["spec"]["template"]["spec"] for entry, _ in found}


@rule(
    "trainjob-patch-manager",
    ERROR,
    TrainJob,
    why="The webhook denies a patch whose manager is not a path behind a domain.",
    fix="Write who makes the patch, such as team.example.com/storage.",
)
def trainjob_patch_manager(job: TrainJob) -> Iterator[Hit]:
    for patch in job.spec["runtimePatches"].each():
        place = patch["manager"]
        if place.text and not MANAGER.fullmatch(place.text):
            yield Hit(place, f"manager '{place.text}'")


@rule(
    "trainjob-no-deadline",
    WARNING,
    TrainJob,
    why="Nothing ends a job that hangs. Trainer 2.0 and 2.1 have no deadline for a TrainJob; its runtime's Job "
    "has one.",
    fix="From 2.2 on write spec.activeDeadlineSeconds; before, activeDeadlineSeconds in the spec of the runtime's Job.",
)
def trainjob_no_deadline(job: TrainJob) -> Iterator[Hit]:
    place = job.spec["activeDeadlineSeconds"]
    if place or (job.runtime is None and job.before("2.2")):
        return
    trainer = job.runtime.trainer if job.runtime else None
    if job.runtime and trainer is None:
        return  # covered by runtime-no-trainer
    if trainer is None or not trainer["template"]["spec"]["activeDeadlineSeconds"]:
        yield Hit(place, "no deadline in the job, and none in its runtime" if job.runtime else "no deadline")


@rule(
    "trainjob-managed-by",
    ERROR,
    TrainJob,
    why="The API server denies any other manager.",
    fix="Leave managedBy out, or write trainer.kubeflow.org/trainjob-controller or kueue.x-k8s.io/multikueue.",
)
def trainjob_managed_by(job: TrainJob) -> Iterator[Hit]:
    place = job.spec["managedBy"]
    if place and place.text not in ("trainer.kubeflow.org/trainjob-controller", "kueue.x-k8s.io/multikueue"):
        yield Hit(place, f"managedBy '{place.value}'")


@rule(
    "runtime-no-trainer",
    ERROR,
    Runtime,
    why=f"What a TrainJob says of nodes, image, command and env goes to the replicated job labelled {ANCESTOR_LABEL}: "
    "trainer. Without one it is silently left out: the runtime's own container runs, on one node, and the job is "
    "Complete.",
    fix=f'Label the replicated job: template.metadata.labels["{ANCESTOR_LABEL}"]: trainer.',
)
def runtime_no_trainer(runtime: Runtime) -> Iterator[Hit]:
    if runtime.trainer is None:
        yield Hit(runtime.job_set["replicatedJobs"], "no replicated job is labelled as the trainer")


@rule(
    "runtime-container-name",
    ERROR,
    Runtime,
    why=f"The trainer's container is found by the name `{TRAINJOB.container}`; the webhook denies runtimes without it.",
    fix=f"Call the training container {TRAINJOB.container}.",
)
def runtime_container_name(runtime: Runtime) -> Iterator[Hit]:
    if runtime.trainer is not None:
        containers = runtime.trainer["template"]["spec"]["template"]["spec"]["containers"]
        names = [container["name"].text for container in containers.each()]
        if TRAINJOB.container not in names:
            yield Hit(containers, f"containers are called {', '.join(names) or '(none)'}")


@rule(
    "runtime-replicas",
    ERROR,
    Runtime,
    why="The webhook denies replicas other than 1: nodes are the parallelism of one indexed Job.",
    fix="Leave replicas out; write mlPolicy.numNodes.",
)
def runtime_replicas(runtime: Runtime) -> Iterator[Hit]:
    for entry, step in runtime.replicated_jobs():
        if step and entry["replicas"] and entry["replicas"].number != 1:
            yield Hit(entry["replicas"], f"replicas {entry['replicas'].value}")


@rule(
    "runtime-ttl",
    ERROR,
    Runtime,
    why="A TTL deletes the finished JobSet, not the TrainJob, whose controller misses it and recreates it: the "
    "whole training runs again, and again after every TTL. Trainer 2.1 does so with all jobs, 2.3 with those that "
    "failed. (Measured.)",
    fix="Remove ttlSecondsAfterFinished from the JobSet and its Jobs; delete finished TrainJobs by other means.",
)
def runtime_ttl(runtime: Runtime) -> Iterator[Hit]:
    place = runtime.job_set["ttlSecondsAfterFinished"]
    if place:
        yield Hit(place, f"ttlSecondsAfterFinished {place.value}")


@rule(
    "runtime-restarts-alone",
    WARNING,
    Runtime,
    why="The Job controller recreates a failed pod alone, six times unless backoffLimit says otherwise, while the "
    "others wait for a process group that has lost its member; exit codes that no restart can help count like "
    "any other.",
    fix="Write backoffLimit: 0 and a podFailurePolicy in the Job's spec, and failurePolicy.maxRestarts in the "
    "JobSet's, which restarts all workers together.",
)
def runtime_restarts_alone(runtime: Runtime) -> Iterator[Hit]:
    nodes = max((pod.replicas for pod in runtime.pods if pod.main), default=1)
    if runtime.trainer is not None and nodes > 1:
        place = runtime.trainer["template"]["spec"]["backoffLimit"]
        if place.number != 0:
            yield Hit(place, f"backoffLimit {'6 by default' if not place else place.value} for {nodes} nodes")


@rule(
    "runtime-elastic",
    ERROR,
    Runtime,
    why="Trainer does nothing with torch.elasticPolicy (2.2 removed it), and the API server denies it beside numNodes.",
    fix="Write mlPolicy.numNodes; elastic training needs a PyTorchJob.",
)
def runtime_elastic(runtime: Runtime) -> Iterator[Hit]:
    place = runtime.place["spec"]["mlPolicy"]["torch"]["elasticPolicy"]
    if place:
        yield Hit(place, "elasticPolicy of a runtime")
