"""JobSpec → Kubernetes objects as plain dicts, ready for YAML or the API. Pure: same spec, same objects."""

from __future__ import annotations

from manifests import pytorchjob, trainjob
from manifests.kinds import DEVICE_CLAIMS, TRAINJOB, Object
from manifests.names import DIGEST_ANNOTATION, SPEC_FILE, Task, job_name, kind, labels
from manifests.network import worker_policy
from manifests.objects import device_requests, fabric_of, gibibytes
from manifests.queue import job_labels
from manifests.spec import JobSpec
from trainer.errors import SpecError
from trainer.spec import TrainSpec
from trainer.specbase import canonical_digest, to_yaml

DATASETS_GIB, CHECKPOINTS_GIB = 200, 500


def job_objects(job: JobSpec, task: Task = "train") -> list[Object]:
    """The objects of one task in the order of creation: those that the job needs, then the job.

    Raises:
        SpecError: a storage directory is not a valid mount path.
    """
    for field in ("datasets_dir", "checkpoints_dir"):
        if not getattr(job.storage, field).startswith("/"):
            raise SpecError(f"storage.{field} {getattr(job.storage, field)!r} must be an absolute path in the pods")
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, task),
        "spec": worker_policy(job, task),
    }
    needs = [config_map(job, task), policy]
    if task == "train" and job.cluster.devices:
        needs.append(
            {
                "apiVersion": f"{DEVICE_CLAIMS.group}/{DEVICE_CLAIMS.version}",
                "kind": DEVICE_CLAIMS.kind,
                "metadata": _metadata(job, task),
                "spec": device_requests(job.cluster.devices),
            }
        )
    if kind(job) is TRAINJOB:
        runtime = {
            "apiVersion": TRAINJOB.api_version,
            "kind": "TrainingRuntime",
            "metadata": _metadata(job, task),
            "spec": trainjob.runtime_spec(job, task),
        }
        needs, spec = [*needs, runtime], trainjob.job_spec(job, task)
    else:
        spec = pytorchjob.job_spec(job, task)
    metadata = _metadata(job, task)
    metadata["labels"] |= job_labels(job.cluster)
    # Distinguishes a job made from exactly this spec from one of the same name with other resources.
    contents = [item.get("spec", item.get("data")) for item in needs]
    metadata["annotations"] = {DIGEST_ANNOTATION: canonical_digest([spec, *contents])}
    return [*needs, {"apiVersion": kind(job).api_version, "kind": kind(job).kind, "metadata": metadata, "spec": spec}]


def config_map(job: JobSpec, task: Task = "train") -> Object:
    """The TrainSpec that the workers mount."""
    data = {SPEC_FILE: to_yaml(worker_spec(job))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, task), "data": data}


def worker_spec(job: JobSpec) -> TrainSpec:
    """The run's TrainSpec with what the trainer must check itself: deadline, GPUs, size of /dev/shm, fabric.

    The operator checks its deadline only when a pod changes. If GPUs are requested, device `auto` would train on the
    CPU of a node that has lost them.
    """
    spec, cluster = job.train_spec(), job.cluster
    runtime: Object = {}
    if spec.runtime.deadline_seconds is None:
        runtime["deadline_seconds"] = cluster.run_timeout_seconds
    if spec.runtime.device == "auto" and cluster.gpus_per_node:
        runtime["device"] = "cuda"
    preflight: Object = {}
    if spec.runtime.preflight.min_shared_memory_gib is None:
        preflight["min_shared_memory_gib"] = cluster.shared_memory_gib
    if named := fabric_of(job):
        preflight["fabric"] = named
    if preflight:
        runtime["preflight"] = preflight
    return spec.updated({"runtime": runtime})


def pvcs(job: JobSpec, *, datasets_gib: float = DATASETS_GIB, checkpoints_gib: float = CHECKPOINTS_GIB) -> list[Object]:
    """The two claims, of the default storage class; shared by the pods of all nodes."""
    sizes = {job.storage.datasets_pvc: datasets_gib, job.storage.checkpoints_pvc: checkpoints_gib}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "yaongi"}},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": gibibytes(size)}},
            },
        }
        for name, size in sizes.items()
    ]


def _metadata(job: JobSpec, task: Task) -> Object:
    space = {"namespace": job.cluster.namespace} if job.cluster.namespace else {}
    return {"name": job_name(job, task), **space, "labels": labels(job, task)}
