"""The worker's pod: it satisfies the restricted Pod Security Standard and works with a read-only root.

Pure functions from the spec to plain dicts; `render` puts them into a job.
"""

from __future__ import annotations

import math

from manifests.kinds import Object
from manifests.names import (
    EGRESS_LABEL,
    HUB,
    HUB_SECRET,
    JUDGE_SECRET,
    SPEC_DIR,
    SPEC_FILE,
    Task,
    job_name,
    kind,
    labels,
    ranks_per_pod,
)
from manifests.spec import JobSpec
from trainer.process.failures import NODE_VARIABLE

USER_ID = 1000
SCRATCH_GIB = 16


def without_rights() -> Object:
    """The securityContext of a container that needs no right at all."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_template(job: JobSpec, task: Task) -> Object:
    cluster = job.cluster
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            # Changing the owner of millions of files at every start would take longer than the start itself.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container(job, task)],
        "volumes": volumes(job, task),
    }
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations]
    metadata = {
        "labels": labels(job, task) | ({EGRESS_LABEL: HUB} if _has_benchmarks(job, task) else {}),
        # A service mesh's sidecar outlives the training process and encrypts NCCL's traffic: the pod would never
        # finish.
        "annotations": {"sidecar.istio.io/inject": "false"},
    }
    return {"metadata": metadata, "spec": spec}


def container(job: JobSpec, task: Task) -> Object:
    ports = metrics_ports(job, task)
    return {
        "name": kind(job).container,
        "image": job.cluster.image,
        "imagePullPolicy": job.cluster.image_pull_policy,
        # args, not command: the image's entrypoint sets the umask and reaps zombies as PID 1.
        "args": ["python", "-m", "trainer.entrypoint", task, "--spec", f"{SPEC_DIR}/{SPEC_FILE}"],
        "env": [
            *({"name": name, "value": value} for name, value in environment(job, task).items()),
            {"name": NODE_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": "token", "optional": True}}}
                for name, secret in secrets(job, task).items()
            ),
        ],
        **({"ports": ports} if ports else {}),
        "resources": resources(job, task),
        "securityContext": without_rights(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "spec", "mountPath": SPEC_DIR, "readOnly": True},
            {"name": "datasets", "mountPath": job.storage.datasets_dir, "readOnly": True},
            {"name": "checkpoints", "mountPath": job.storage.checkpoints_dir},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def environment(job: JobSpec, task: Task) -> dict[str, str]:
    """Variables that depend on the pod: its share of the CPUs, and that only /tmp is writable."""
    threads = max(1, math.floor(job.cluster.cpus_per_node / ranks_per_pod(job, task)))
    # The datasets of benchmarks, kept from one evaluation to the next. The volume of the datasets is read-only here.
    cache = {"HF_HOME": f"{job.storage.checkpoints_dir}/huggingface"} if _has_benchmarks(job, task) else {}
    return cache | {
        "OMP_NUM_THREADS": str(threads),
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "XDG_CACHE_HOME": "/tmp/cache",
        # Inductor names its cache after the user, but the image may have no user with this id.
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/cache/inductor",
        "TRITON_CACHE_DIR": "/tmp/cache/triton",
    }


def secrets(job: JobSpec, task: Task) -> dict[str, str]:
    """The variables of access tokens, and the secrets whose key `token` they are."""
    if not _has_benchmarks(job, task):
        return {}
    judge = job.train.evaluate.judge
    return {"HF_TOKEN": HUB_SECRET} | ({judge.api_key_env: JUDGE_SECRET} if judge and judge.api_key_env else {})


def metrics_ports(job: JobSpec, task: Task) -> list[Object]:
    """One port for each local rank; an evaluation serves metrics only of benchmarks, an export none."""
    first = job.train.runtime.metrics_port
    if first == 0 or not (task == "train" or _has_benchmarks(job, task)):
        return []
    return [
        {"name": f"metrics-{rank}", "containerPort": first + rank, "protocol": "TCP"}
        for rank in range(ranks_per_pod(job, task))
    ]


def _has_benchmarks(job: JobSpec, task: Task) -> bool:
    return task == "evaluate" and job.train.evaluate.has_benchmarks


def resources(job: JobSpec, task: Task) -> Object:
    """Memory is a hard limit. CPUs are only requested: CPU throttling would stall the gradient reduction."""
    cluster = job.cluster
    memory = gibibytes(cluster.memory_gib_per_node)
    limits = {"memory": memory}
    if cluster.gpus_per_node:
        limits["nvidia.com/gpu"] = str(ranks_per_pod(job, task))
    return {"requests": {"cpu": cpus(cluster.cpus_per_node), **limits}, "limits": limits}


def volumes(job: JobSpec, task: Task) -> list[Object]:
    return [
        {"name": "spec", "configMap": {"name": job_name(job, task)}},
        {"name": "datasets", "persistentVolumeClaim": {"claimName": job.storage.datasets_pvc}},
        {"name": "checkpoints", "persistentVolumeClaim": {"claimName": job.storage.checkpoints_pvc}},
        {"name": "tmp", "emptyDir": {"sizeLimit": gibibytes(SCRATCH_GIB)}},
        # The container runtime's /dev/shm has 64 MiB, too small for NCCL between the GPUs of a node.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": gibibytes(job.cluster.shared_memory_gib)}},
    ]


def gibibytes(amount: float) -> str:
    return f"{int(amount)}Gi" if float(amount).is_integer() else f"{round(amount * 1024)}Mi"


def cpus(amount: float) -> str:
    return str(int(amount)) if float(amount).is_integer() else f"{round(amount * 1000)}m"
