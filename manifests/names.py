"""Names and labels of a run's objects in the cluster; all modules use these, so that they find the same objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from manifests.kinds import KINDS, TRAINJOB, JobKind

if TYPE_CHECKING:
    from manifests.spec import JobSpec

Task = Literal["train", "evaluate", "export"]

APP = "yaongi-trainer"
APP_LABEL = "app.kubernetes.io/name"
INSTANCE_LABEL = "app.kubernetes.io/instance"
EGRESS_LABEL, HUB = "yaongi/egress", "hub"  # on steps that fetch data from the web
RUN_LABEL = "yaongi/run"
TASK_LABEL = "yaongi/task"
PIPELINE_LABEL = "yaongi/pipeline-run"  # on launched jobs: the run of the pipeline whose launcher follows it
DIGEST_ANNOTATION = "yaongi/digest"

STEP_APP = "yaongi-step"  # on pods of the pipeline's steps
SERVER_APP = "yaongi-server"  # on pods that serve an exported model
STEP_METRICS_PORT = 9390  # below those of the ranks, which may run on the same machine

SPEC_DIR = "/etc/yaongi"
SPEC_FILE = "train.yaml"

# A worker's name is a DNS label, because others find it by that name; an indexed Job adds six characters for its pod.
DNS_LABEL_CHARACTERS = 63
POD_SUFFIX_CHARACTERS = len("-abcde")


def kind(job: JobSpec) -> JobKind:
    return KINDS[job.cluster.job]


def replicas(job: JobSpec, task: Task) -> int:
    """Workers of a task: evaluation and export are one process."""
    return job.cluster.nodes if task == "train" else 1


def ranks_per_pod(job: JobSpec, task: Task) -> int:
    return job.cluster.ranks_per_node if task == "train" else 1


def job_name(job: JobSpec, task: Task = "train") -> str:
    """Name of the job and its mounted objects: the run's name for training, else `<run>-evaluate`, `<run>-export`.

    If it is too long for its pods, the end of its readable part is cut, never its hash.
    """
    suffix = "" if task == "train" else f"-{task}"
    last_worker = kind(job).worker_name("", replicas(job, task) - 1)
    longest = DNS_LABEL_CHARACTERS - len(last_worker) - len(suffix)
    if kind(job) is TRAINJOB:
        longest -= POD_SUFFIX_CHARACTERS
    readable, _, digest = job.run_name.rpartition("-")
    kept = readable[: longest - len(digest) - 1].rstrip("-")
    return f"{kept}-{digest}{suffix}"


def labels(job: JobSpec, task: Task) -> dict[str, str]:
    return {
        APP_LABEL: APP,
        INSTANCE_LABEL: job_name(job, task),
        "app.kubernetes.io/component": task,
        "app.kubernetes.io/part-of": "yaongi",
        "app.kubernetes.io/managed-by": "yaongi",
        RUN_LABEL: job.run_name,
        TASK_LABEL: task,
    }
