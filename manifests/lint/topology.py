"""Replicas, elastic policy, rendezvous, processes per pod."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.kinds import PYTORCHJOB
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Pod, PyTorchJob
from manifests.names import DNS_LABEL_CHARACTERS

ERROR, WARNING = Severity.ERROR, Severity.WARNING
BACKENDS = ("c10d", "etcd", "etcd-v2")
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@rule(
    "replica-types",
    ERROR,
    PyTorchJob,
    why="The webhook denies a job without replicas, or with types other than Master and Worker, spelled so.",
    fix="Write spec.pytorchReplicaSpecs with a Worker, and no Master.",
)
def replica_types(job: PyTorchJob) -> Iterator[Hit]:
    specs = job.spec["pytorchReplicaSpecs"]
    if not list(specs.fields()) and not isinstance(specs.value, list | str):
        yield Hit(specs, "no replicas")
    for name, place in specs.fields():
        if name not in ("Master", "Worker"):
            yield Hit(place, f"replica type '{name}'")


@rule(
    "master-replicas",
    ERROR,
    PyTorchJob,
    why="The webhook looks at the job before defaults are filled in and denies a Master whose replicas are not "
    "written as 1.",
    fix="Write replicas: 1 at the Master, or better have workers only.",
)
def master_replicas(job: PyTorchJob) -> Iterator[Hit]:
    if job.master and job.master["replicas"].number != 1:
        yield Hit(job.master["replicas"], f"Master has replicas {job.master['replicas'].value}")


@rule(
    "container-name",
    ERROR,
    PyTorchJob,
    why=f"The operator gives addresses and ranks to, and reads exit codes from, the container called "
    f"`{PYTORCHJOB.container}`; the webhook denies a job without one.",
    fix=f"Call the training container {PYTORCHJOB.container}.",
)
def container_name(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        containers = role["template"]["spec"]["containers"]
        names = [container["name"].text for container in containers.each()]
        if PYTORCHJOB.container not in names and not isinstance(containers.value, dict | str):
            yield Hit(containers, f"containers are called {', '.join(names) or '(none)'}")


@rule(
    "image-missing",
    ERROR,
    PyTorchJob,
    why="The webhook denies containers without an image.",
    fix="Write the container's image.",
)
def image_missing(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        for container in role["template"]["spec"]["containers"].each():
            if container["image"].value in (None, ""):
                yield Hit(container["image"], f"container '{container['name'].text}' has no image")


@rule(
    "job-name",
    ERROR,
    PyTorchJob,
    why="The name begins the names of pods and of a service each, which are DNS labels of at most 63 characters. The "
    "webhook denies a longer or malformed name, but not one that only becomes too long with -worker-0: then services "
    "cannot be made, and the job stays without any status while its pods look for each other.",
    fix="Shorten metadata.name; lower-case letters, digits and -, beginning with a letter.",
)
def job_name(job: PyTorchJob) -> Iterator[Hit]:
    place = job.place["metadata"]["name"]
    suffix = PYTORCHJOB.worker_name("", max(0, job.replicas(job.worker) - 1)) if job.worker else "-master-0"
    if place.text and not _DNS_LABEL.fullmatch(place.text):
        yield Hit(place, f"'{place.text}' is no DNS label")
    elif len(place.text) + len(suffix) > DNS_LABEL_CHARACTERS:
        yield Hit(place, f"'{place.text}{suffix}' has {len(place.text) + len(suffix)} characters")


@rule(
    "no-rendezvous",
    ERROR,
    PyTorchJob,
    why="Workers without a Master and without elasticPolicy get PET_NNODES and PET_NPROC_PER_NODE only: no "
    "MASTER_ADDR, no rank, no rendezvous endpoint. Each waits for the others at its own address.",
    fix="Add elasticPolicy with minReplicas and maxReplicas equal to the workers' replicas.",
)
def no_rendezvous(job: PyTorchJob) -> Iterator[Hit]:
    if job.worker and not job.master and not job.elastic and job.replicas(job.worker) > 1:
        yield Hit(job.spec["elasticPolicy"], f"{job.replicas(job.worker)} workers, no Master, no elasticPolicy")


@rule(
    "elastic-with-master",
    ERROR,
    PyTorchJob,
    why="The elastic policy counts workers only and makes worker-0 the meeting point. The Master joins as one "
    "node more than PET_NNODES allows, so it, or a worker, is left out and waits until its rendezvous times "
    "out.",
    fix="Remove the Master and give the Worker its replica; worker 0 has rank 0.",
)
def elastic_with_master(job: PyTorchJob) -> Iterator[Hit]:
    if job.master and job.worker and job.elastic:
        yield Hit(job.master, "Master beside an elasticPolicy")


@rule(
    "elastic-without-worker",
    ERROR,
    PyTorchJob,
    why="The webhook denies an elasticPolicy without workers.",
    fix="Make the replicas Workers, or remove elasticPolicy.",
)
def elastic_without_worker(job: PyTorchJob) -> Iterator[Hit]:
    if job.elastic and job.spec["pytorchReplicaSpecs"].value and not job.worker:
        yield Hit(job.elastic, "elasticPolicy without a Worker")


@rule(
    "master-init-container",
    WARNING,
    PyTorchJob,
    why="For a Master the operator puts an init container into every worker, without a security context and from "
    "Docker Hub (alpine:3.10) unless configured otherwise. Restricted Pod Security rejects these workers while the "
    "Master runs and the job shows no status; without a way to Docker Hub they never start.",
    fix="Use workers only, with elasticPolicy.",
)
def master_init_container(job: PyTorchJob) -> Iterator[Hit]:
    if job.master and job.worker and not job.elastic:  # covered by elastic-with-master
        yield Hit(job.master, "Master and Worker")


@rule(
    "elastic-bounds",
    ERROR,
    PyTorchJob,
    why="Nothing checks the bounds: minReplicas above maxReplicas, or replicas outside of them, are accepted, and the "
    "rendezvous waits for a number of workers that never comes.",
    fix="Keep minReplicas ≤ replicas ≤ maxReplicas; all equal for a fixed size.",
)
def elastic_bounds(job: PyTorchJob) -> Iterator[Hit]:
    low, high = job.elastic["minReplicas"].number, job.elastic["maxReplicas"].number
    low, high = (high if low is None else low), (low if high is None else high)
    if low is None or high is None:
        return
    workers = job.replicas(job.worker)
    is_known = not job.worker["replicas"] or (job.worker["replicas"].number or 0) > 0
    if low > high:
        yield Hit(job.elastic["minReplicas"], f"minReplicas {low} is above maxReplicas {high}")
    elif job.worker and is_known and not low <= workers <= high:
        yield Hit(job.worker["replicas"], f"{workers} workers are outside of [{low}, {high}]")


@rule(
    "elastic-half",
    WARNING,
    PyTorchJob,
    why="When only one of minReplicas and maxReplicas is written, the operator copies it to the other: the job is not "
    "elastic, whatever its replicas are.",
    fix="Write both.",
)
def elastic_half(job: PyTorchJob) -> Iterator[Hit]:
    low, high = job.elastic["minReplicas"], job.elastic["maxReplicas"]
    if bool(low) != bool(high):
        yield Hit(job.elastic, f"only {'minReplicas' if low else 'maxReplicas'} is written")


@rule(
    "rdzv-conf-empty",
    ERROR,
    PyTorchJob,
    why="An empty rdzvConf makes the operator panic whenever it reconciles the job: no pods, no status, no event.",
    fix="Remove rdzvConf, or give it an entry.",
)
def rdzv_conf_empty(job: PyTorchJob) -> Iterator[Hit]:
    if job.elastic["rdzvConf"].value == []:
        yield Hit(job.elastic["rdzvConf"], "rdzvConf is an empty list")


@rule(
    "rdzv-backend",
    ERROR,
    PyTorchJob,
    why="Any backend is accepted, but torchrun knows c10d, etcd and etcd-v2 only; with etcd and no rdzvHost the "
    "endpoint is worker-0, where no etcd listens.",
    fix="Use rdzvBackend: c10d, or give etcd's address in rdzvHost and rdzvPort.",
)
def rdzv_backend(job: PyTorchJob) -> Iterator[Hit]:
    backend = job.elastic["rdzvBackend"]
    if backend and backend.text not in BACKENDS:
        yield Hit(backend, f"backend '{backend.value}'")
    elif backend.text.startswith("etcd") and not job.elastic["rdzvHost"]:
        yield Hit(backend, f"backend {backend.text} without rdzvHost")


@rule(
    "standalone-nodes",
    ERROR,
    PyTorchJob,
    why="standalone makes every pod's torchrun a job of its own: each pod trains the whole model alone on rank 0, and "
    "all write the same checkpoints.",
    fix="Remove standalone.",
)
def standalone_nodes(job: PyTorchJob) -> Iterator[Hit]:
    if job.elastic["standalone"].value is True and job.replicas(job.worker) > 1:
        yield Hit(job.elastic["standalone"], f"standalone with {job.replicas(job.worker)} workers")


@rule(
    "nproc-deprecated",
    ERROR,
    PyTorchJob,
    why="elasticPolicy.nProcPerNode is deprecated; beside spec.nprocPerNode the webhook denies the job.",
    fix="Write spec.nprocPerNode only, as a string.",
)
def nproc_deprecated(job: PyTorchJob) -> Iterator[Hit]:
    if job.elastic["nProcPerNode"] and job.spec["nprocPerNode"]:
        yield Hit(job.elastic["nProcPerNode"], "nProcPerNode and nprocPerNode are both written")


@rule(
    "nproc-not-gpus",
    ERROR,
    Pod,
    why="torchrun starts as many processes as are written. Two on one GPU end in NCCL's 'Duplicate GPU detected'; "
    "fewer than GPUs leave the rest idle, but allocated.",
    fix="Make the processes per node equal to the GPUs of the pod's limits.",
)
def nproc_not_gpus(pod: Pod) -> Iterator[Hit]:
    if any(launch.number("nproc_per_node") is not None for launch in pod.launches):
        return  # that counts
    if pod.trainer and pod.trainer.place["numProcPerNode"]:
        return  # covered by trainjob-nproc-not-gpus
    if pod.main and pod.accelerators and pod.processes and pod.processes != pod.accelerators:
        place = pod.main.resources["limits"]
        yield Hit(place, f"{pod.processes} processes for {pod.accelerators} GPUs")


@rule(
    "nproc-auto-cpu",
    WARNING,
    PyTorchJob,
    why='nprocPerNode is "auto" unless written, and without a GPU torchrun takes that for the number of the '
    "node's CPU cores, not of the pod's: dozens of processes in a pod of two CPUs.",
    fix='Write nprocPerNode: "1", or as many as the pod has CPUs for.',
)
def nproc_auto_cpu(job: PyTorchJob) -> Iterator[Hit]:
    runs = [
        launch
        for pod in job.pods
        if not pod.accelerators
        for launch in pod.launches
        if launch.launcher == "torchrun" and launch.options.get("nproc_per_node") in (None, "auto", "cpu")
    ]
    if runs and job.processes is None:
        yield Hit(job.spec["nprocPerNode"], "torchrun on CPUs without a number of processes")


@rule(
    "nproc-auto-world-size",
    ERROR,
    PyTorchJob,
    why='For a Master the operator computes WORLD_SIZE as replicas × nprocPerNode and counts "auto", the default, '
    "as 1. A script that reads WORLD_SIZE itself then waits for, or splits its data by, too few ranks.",
    fix="Write nprocPerNode as the number of GPUs of a pod.",
)
def nproc_auto_world_size(job: PyTorchJob) -> Iterator[Hit]:
    gpus = max((pod.accelerators for pod in job.pods), default=0)
    # A launcher sets WORLD_SIZE for each rank itself.
    by_launcher = all(any(launch.launcher != "python" for launch in pod.launches) for pod in job.pods)
    if job.master and job.processes is None and gpus > 1 and not by_launcher:
        yield Hit(job.spec["nprocPerNode"], f"WORLD_SIZE will be {job.pod_count} for {job.pod_count * gpus} GPUs")
