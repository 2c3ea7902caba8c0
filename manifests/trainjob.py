"""The specs of a TrainJob and of the TrainingRuntime that it refers to, as Kubeflow Trainer 2.1, 2.2 and 2.3 take them.

The pods are described in the runtime, because a TrainJob has no fields for volumes, ports or security. All workers are
one indexed Job: its pod failure policy separates permanent exit codes from others, and its JobSet restarts all workers
together, from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from manifests.kinds import ANCESTOR_LABEL, TRAINJOB, Object
from manifests.names import Task, job_name, ranks_per_pod, replicas
from manifests.objects import pod_template
from manifests.spec import JobSpec
from trainer.errors import SpecError
from trainer.exitcodes import retryable

# The entrypoint, which counts on the volume, ends a run that restarts without progress. This limit is only for pods
# that die before the entrypoint can count; it must not end a run that is preempted every few minutes.
MOST_RESTARTS = 1000
DEADLINE = "activeDeadlineSeconds"
RELEASES = ("2.1", "2.2", "2.3")
_WITHOUT_DEADLINE = ("2.1",)  # their TrainJobs have no such field


def job_spec(job: JobSpec, task: Task) -> Object:
    reference = {"apiGroup": TRAINJOB.group, "kind": "TrainingRuntime", "name": job_name(job, task)}
    return {
        "runtimeRef": reference,
        "trainer": {"numNodes": replicas(job, task), "numProcPerNode": ranks_per_pod(job, task)},
    }


def bounded(objects: Sequence[Object]) -> Object:
    """The TrainJob, the last of a job's objects, with a deadline of its own, which Trainer has from 2.2 on.

    It is that of the runtime's Job, which begins anew whenever all workers restart; this one counts restarts too.
    """
    *_, job = objects
    (runtime,) = (item for item in objects if item["kind"] == "TrainingRuntime")
    (replicated_job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {**job, "spec": {**job["spec"], DEADLINE: replicated_job["template"]["spec"][DEADLINE]}}


def for_release(objects: Sequence[Object], release: str) -> list[Object]:
    """A job's objects with what this release of Trainer has beyond the others.

    Raises:
        SpecError: the release is not one of `RELEASES`, or the job is no TrainJob.
    """
    if release not in RELEASES:
        raise SpecError(f"--trainer-version {release} is not one of {', '.join(RELEASES)}")
    if objects[-1]["kind"] != TRAINJOB.kind:
        raise SpecError(f"--trainer-version {release} is about TrainJobs; set cluster.job=trainjob, or leave it out")
    return list(objects) if release in _WITHOUT_DEADLINE else [*objects[:-1], bounded(objects)]


def runtime_spec(job: JobSpec, task: Task) -> Object:
    """What a release of Trainer does not know is left out: torch has no fields, as the TrainJob says the number of
    processes. There is no TTL: when it deletes the JobSet of a job that has failed, all releases run that job again
    (2.1 also one that has succeeded)."""
    replicated_job = {
        "name": TRAINJOB.container,
        "replicas": 1,
        "template": {
            "metadata": {"labels": {ANCESTOR_LABEL: "trainer"}},
            "spec": _workers(job, task),
        },
    }
    return {
        "mlPolicy": {
            "numNodes": replicas(job, task),
            "torch": {},
        },
        "template": {
            "spec": {
                "replicatedJobs": [replicated_job],
                "failurePolicy": {
                    "maxRestarts": MOST_RESTARTS,
                    # Two generations of workers must never write the same checkpoints.
                    "restartStrategy": "BlockingRecreate",
                    "rules": [
                        {
                            "name": "permanent",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                        }
                    ],
                },
            }
        },
    }


def _workers(job: JobSpec, task: Task) -> Object:
    template = pod_template(job, task)
    template["spec"]["restartPolicy"] = "Never"  # required by the failure policy
    (container,) = template["spec"]["containers"]
    # torchrun's default would give up on workers whose image or node takes longer than ten minutes.
    timeout = {"name": "PET_RDZV_CONF", "value": f"timeout={job.cluster.start_timeout_seconds}"}
    container["env"].append(timeout)
    permanent = [code for code in range(1, 256) if not retryable(code)]
    return {
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one lost worker breaks the process group of all
        DEADLINE: job.cluster.deadline_seconds,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": TRAINJOB.container, "operator": "In", "values": permanent},
                }
            ]
        },
        "template": template,
    }
