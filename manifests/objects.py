"""The worker's pod: it satisfies the restricted Pod Security Standard and works with a read-only root.

Pure functions from the spec to plain dicts; `render` puts them into a job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from manifests import fabric
from manifests.kinds import Object
from manifests.names import (
    EGRESS_LABEL,
    HUB,
    INSTANCE_LABEL,
    SPEC_DIR,
    SPEC_FILE,
    Task,
    job_name,
    kind,
    labels,
    ranks_per_pod,
)
from manifests.queue import topology_annotations
from manifests.spec import JobSpec
from trainer.fabric import FabricName
from trainer.process.failures import NODE_VARIABLE
from trainer.trackerspec import TrackerName, variables_of

USER_ID = 1000
SCRATCH_GIB = 16
DEVICES = "devices"  # the pod's claim of devices by class
# containerd's NRI plugin ulimit-adjuster; the container's name follows. All its versions read this key.
ULIMITS_ANNOTATION = "ulimits.nri.containerd.io/container."
ULIMIT_MODULUS = 2**64  # -1 as the kernel writes "unlimited": RLIM_INFINITY


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
        "labels": labels(job, task) | ({EGRESS_LABEL: HUB} if _reaches_the_web(job, task) else {}),
        # A service mesh's sidecar outlives the training process and encrypts NCCL's traffic: the pod would never
        # finish.
        "annotations": {"sidecar.istio.io/inject": "false"} | topology_annotations(cluster),
    }
    template = {"metadata": metadata, "spec": spec}
    if task == "train":
        _for_training(job, template)
    return template


def _for_training(job: JobSpec, template: Object) -> None:
    """Add what only training pods have: the user's labels and annotations, devices, the fabric, their spread."""
    cluster, spec, metadata = job.cluster, template["spec"], template["metadata"]
    (worker,) = spec["containers"]
    metadata["labels"] = dict(cluster.labels) | metadata["labels"]
    metadata["annotations"] = dict(cluster.annotations) | metadata["annotations"]
    if cluster.ulimits:
        limits = [
            {"type": name, "hard": value % ULIMIT_MODULUS, "soft": value % ULIMIT_MODULUS}
            for name, value in cluster.ulimits.items()
        ]
        metadata["annotations"][f"{ULIMITS_ANNOTATION}{worker['name']}"] = json.dumps(limits)
    if cluster.devices:
        spec["resourceClaims"] = [{"name": DEVICES, "resourceClaimTemplateName": job_name(job, "train")}]
        worker["resources"]["claims"] = [{"name": DEVICES}]
    if named := fabric_of(job):
        fabric.apply(named, template, worker["volumeMounts"])
    if (spread := cluster.spread) and cluster.nodes > 1:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": spread.max_skew,
                "topologyKey": spread.topology_key,
                "whenUnsatisfiable": "DoNotSchedule" if spread.required else "ScheduleAnyway",
                "labelSelector": {"matchLabels": {INSTANCE_LABEL: job_name(job, "train")}},
            }
        ]


def device_requests(devices: Mapping[str, int]) -> Object:
    """The spec of the template of a pod's device claim (resource.k8s.io/v1): so many of each class."""
    requests = [
        {"name": f"class-{index}", "exactly": {"deviceClassName": name, "allocationMode": "ExactCount", "count": count}}
        for index, (name, count) in enumerate(devices.items())
    ]
    return {"spec": {"devices": {"requests": requests}}}


def fabric_of(job: JobSpec) -> FabricName | None:
    """The network between the job's nodes, if one is named and there are several."""
    return None if job.cluster.fabric == "none" or job.cluster.nodes == 1 else job.cluster.fabric


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
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
                for name, (secret, key) in secrets(job, task).items()
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
    # The user's own come last and so win over the fabric's.
    own = {} if task != "train" else (fabric.environment(named) if (named := fabric_of(job)) else {}) | job.cluster.env
    return cache | {
        "OMP_NUM_THREADS": str(threads),
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "XDG_CACHE_HOME": "/tmp/cache",
        # Inductor names its cache after the user, but the image may have no user with this id.
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/cache/inductor",
        "TRITON_CACHE_DIR": "/tmp/cache/triton",
        **own,
    }


def trackers(job: JobSpec, task: Task) -> list[TrackerName]:
    """The trackers of which a task's pods get the keys.

    Of Megatron's trainings Langfuse is told even without a section `trackers`, if its secret is there.
    """
    if task == "export":
        return []
    if job.train.trackers is not None:
        return job.train.trackers.names
    return ["langfuse"] if task == "train" and job.train.engine == "megatron" else []


def tracker_secret(job: JobSpec, name: TrackerName) -> str:
    """The Secret with the keys of a tracker."""
    cluster = job.cluster
    return {"wandb": cluster.wandb_secret, "mlflow": cluster.mlflow_secret, "langfuse": cluster.langfuse_secret}[name]


def secrets(job: JobSpec, task: Task) -> dict[str, tuple[str, str]]:
    """Variables with secret content: the secret and its key."""
    judge, cluster = job.train.evaluate.judge, job.cluster
    found: dict[str, tuple[str, str]] = {}
    if _has_benchmarks(job, task):
        found["HF_TOKEN"] = (cluster.hub_secret, "token")
        if judge and judge.api_key_env:
            found[judge.api_key_env] = (cluster.judge_secret, "token")
    for name in trackers(job, task):
        found |= {variable: (tracker_secret(job, name), variable) for variable in variables_of(name)}
    return found


def metrics_ports(job: JobSpec, task: Task) -> list[Object]:
    """One port for each local rank; an evaluation serves metrics only of benchmarks, an export none."""
    first = job.train.runtime.metrics_port
    if first == 0 or not (task == "train" or _has_benchmarks(job, task)):
        return []
    return [
        {"name": f"metrics-{rank}", "containerPort": first + rank, "protocol": "TCP"}
        for rank in range(ranks_per_pod(job, task))
    ]


def _reaches_the_web(job: JobSpec, task: Task) -> bool:
    """Whether a pod must reach addresses outside the cluster: the Hub and a judge, or trackers that the job names."""
    return _has_benchmarks(job, task) or bool(job.train.trackers and trackers(job, task))


def _has_benchmarks(job: JobSpec, task: Task) -> bool:
    return task == "evaluate" and job.train.evaluate.has_benchmarks


def resources(job: JobSpec, task: Task) -> Object:
    """Memory is a hard limit. CPUs are only requested: CPU throttling would stall the gradient reduction."""
    cluster = job.cluster
    memory = gibibytes(cluster.memory_gib_per_node)
    limits = {"memory": memory}
    if cluster.gpus_per_node:
        limits["nvidia.com/gpu"] = str(ranks_per_pod(job, task))
    if task == "train":  # devices and huge pages cannot be overcommitted: requests and limits must be equal
        limits |= {name: str(amount) for name, amount in cluster.resources.items()}
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
