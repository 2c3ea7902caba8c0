"""JobSpec → Kubernetes objects as plain dicts, ready for YAML or the API. Pure: same spec, same objects.

The PyTorchJob is worker-only and always elastic, also with a fixed number of workers: without an elastic policy the
training operator (v1.9) gives workers no rendezvous address, and with a master it injects an init container that
the restricted Pod Security Standard rejects.
"""

from __future__ import annotations

from manifests.names import (
    APP,
    DIGEST_ANNOTATION,
    RUN_LABEL,
    SPEC_FILE,
    Task,
    job_name,
    labels,
    ranks_per_pod,
    replicas,
)
from manifests.objects import Object, gibibytes, pod_template
from manifests.spec import JobSpec
from trainer.spec import TrainSpec
from trainer.specbase import canonical_digest, to_yaml

PYTORCHJOB_API = "kubeflow.org/v1"
DATASETS_GIB, CHECKPOINTS_GIB = 200, 500


def pytorchjob(job: JobSpec, task: Task = "train", owner: Object | None = None) -> Object:
    """The PyTorchJob that runs one task.

    Args:
        owner: an ownerReference (apiVersion, kind, name, uid); the job is collected when its owner is gone.

    Raises:
        ValueError: a storage directory that cannot be a mount path.
    """
    cluster = job.cluster
    for field in ("datasets_dir", "checkpoints_dir"):
        if not getattr(job.storage, field).startswith("/"):
            raise ValueError(f"storage.{field} {getattr(job.storage, field)!r} must be an absolute path in the pods")
    workers = replicas(job, task)
    spec: Object = {
        "nprocPerNode": str(ranks_per_pod(job, task)),
        "elasticPolicy": {
            "minReplicas": workers,
            "maxReplicas": workers,
            "rdzvBackend": "c10d",
            "rdzvId": job_name(job, task),
            # A worker may wait for the others' images and nodes as long as the launcher waits for them.
            "rdzvConf": [{"key": "join_timeout", "value": str(cluster.start_timeout_seconds)}],
            # The entrypoint translates exit codes and keeps the restart budget; torchrun's restarts would hide both.
            "maxRestarts": 0,
        },
        "runPolicy": {
            # The default None would leave the other workers, and their GPUs, running after one has failed.
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": cluster.ttl_seconds_after_finished,
            # Counted from the creation of the job, so waiting is included; the entrypoint bounds the run itself.
            "activeDeadlineSeconds": cluster.queue_timeout_seconds
            + cluster.start_timeout_seconds
            + cluster.run_timeout_seconds,
        },
        "pytorchReplicaSpecs": {
            "Worker": {
                "replicas": workers,
                # Exit codes from 128 recreate the pod, lower ones end the job.
                "restartPolicy": "ExitCode",
                "template": pod_template(job, task),
            }
        },
    }
    metadata: Object = {"name": job_name(job, task), "labels": _with_queue(job, labels(job, task))}
    if cluster.namespace:
        metadata["namespace"] = cluster.namespace
    # Tells a job made of this very spec from one of the same name that asks for other resources.
    metadata["annotations"] = {DIGEST_ANNOTATION: canonical_digest([spec, config_map(job, task)["data"]])}
    if owner:
        metadata["ownerReferences"] = [dict(owner)]
    return {"apiVersion": PYTORCHJOB_API, "kind": "PyTorchJob", "metadata": metadata, "spec": spec}


def config_map(job: JobSpec, task: Task = "train") -> Object:
    """The TrainSpec that the workers mount."""
    metadata: Object = {"name": job_name(job, task), "labels": labels(job, task)}
    if job.cluster.namespace:
        metadata["namespace"] = job.cluster.namespace
    data = {SPEC_FILE: to_yaml(worker_spec(job))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def worker_spec(job: JobSpec) -> TrainSpec:
    """The run's TrainSpec with the cluster's deadline: the operator looks at its own only when a pod changes."""
    spec = job.train_spec()
    if spec.runtime.deadline_seconds is not None:
        return spec
    return spec.updated({"runtime": {"deadline_seconds": job.cluster.run_timeout_seconds}})


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


def pod_monitor(job: JobSpec) -> Object:
    """Scrapes every local rank of every run in its namespace; needs the Prometheus operator.

    Series carry the run beside the namespace and pod that the operator adds: alerts and dashboards select by it.
    """
    interval = f"{job.observability.scrape_interval_seconds:g}s"
    of_run = {"sourceLabels": [f"__meta_kubernetes_pod_label_{RUN_LABEL.replace('/', '_')}"], "targetLabel": "run"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": APP, "labels": dict(job.observability.monitor_labels)},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": APP}},
            "podMetricsEndpoints": [
                {"port": f"metrics-{rank}", "interval": interval, "relabelings": [of_run]}
                for rank in range(job.cluster.ranks_per_node)
            ],
        },
    }


def _with_queue(job: JobSpec, chosen: dict[str, str]) -> dict[str, str]:
    return {**chosen, "kueue.x-k8s.io/queue-name": job.cluster.queue} if job.cluster.queue else chosen
