"""Names and labels of what a run owns in the cluster; all modules ask here, so that they find the same objects."""

from __future__ import annotations

from typing import Literal

from manifests.spec import JobSpec

Task = Literal["train", "evaluate", "export"]

APP = "yaongi-trainer"
CONTAINER = "pytorch"  # the training operator admits no other name
RUN_LABEL = "yaongi/run"
TASK_LABEL = "yaongi/task"
DIGEST_ANNOTATION = "yaongi/digest"
OPERATOR_JOB_LABEL = "training.kubeflow.org/job-name"
OPERATOR_INDEX_LABEL = "training.kubeflow.org/replica-index"

STEP_APP = "yaongi-step"  # pods of the pipeline's steps
STEP_METRICS_PORT = 9390  # below those of the ranks, which may run on the same machine

SPEC_DIR = "/etc/yaongi"
SPEC_FILE = "train.yaml"

# Each worker has a service of its pod's name, and a service's name is a DNS label.
DNS_LABEL_CHARACTERS = 63


def replicas(job: JobSpec, task: Task) -> int:
    """Workers of a task: evaluation and export are one process."""
    return job.cluster.nodes if task == "train" else 1


def ranks_per_pod(job: JobSpec, task: Task) -> int:
    return job.cluster.ranks_per_node if task == "train" else 1


def job_name(job: JobSpec, task: Task = "train") -> str:
    """Name of the PyTorchJob and of its ConfigMap: the run's name for training, else `<run>-evaluate`, `<run>-export`.

    A name too long for its pods loses the end of its readable part, never its hash.
    """
    suffix = "" if task == "train" else f"-{task}"
    longest = DNS_LABEL_CHARACTERS - len(f"-worker-{replicas(job, task) - 1}") - len(suffix)
    readable, _, digest = job.run_name.rpartition("-")
    kept = readable[: longest - len(digest) - 1].rstrip("-")
    return f"{kept}-{digest}{suffix}"


def pod_name(job_name: str, index: int) -> str:
    """What the training operator calls worker `index`."""
    return f"{job_name}-worker-{index}"


def labels(job: JobSpec, task: Task) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": APP,
        "app.kubernetes.io/instance": job_name(job, task),
        "app.kubernetes.io/component": task,
        "app.kubernetes.io/part-of": "yaongi",
        "app.kubernetes.io/managed-by": "yaongi",
        RUN_LABEL: job.run_name,
        TASK_LABEL: task,
    }
