"""The specs of a TrainJob and of the TrainingRuntime that it refers to (Kubeflow Trainer 2.1, JobSet 0.10).

The pods are described in the runtime, because a TrainJob has no fields for volumes, ports or security. All workers are
one indexed Job: its pod failure policy separates permanent exit codes from others, and its JobSet restarts all workers
together, from the last checkpoint.
"""

from __future__ import annotations

from manifests.kinds import ANCESTOR_LABEL, TRAINJOB, Object
from manifests.names import Task, job_name, ranks_per_pod, replicas
from manifests.objects import pod_template
from manifests.spec import JobSpec
from trainer.exitcodes import retryable

# The entrypoint, which counts on the volume, ends a run that restarts without progress. This limit is only for pods
# that die before the entrypoint can count; it must not end a run that is preempted every few minutes.
MOST_RESTARTS = 1000


def job_spec(job: JobSpec, task: Task) -> Object:
    reference = {"apiGroup": TRAINJOB.group, "kind": "TrainingRuntime", "name": job_name(job, task)}
    return {
        "runtimeRef": reference,
        "trainer": {"numNodes": replicas(job, task), "numProcPerNode": ranks_per_pod(job, task)},
    }


def runtime_spec(job: JobSpec, task: Task) -> Object:
    """A finished job is not deleted: Trainer 2.1 has no TTL of its own, and runs the job again when the TTL of its
    JobSet ends."""
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
            "torch": {"numProcPerNode": ranks_per_pod(job, task)},
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
        "activeDeadlineSeconds": job.cluster.deadline_seconds,
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
