"""The spec of a PyTorchJob (training operator 1.9).

It has only workers and is always elastic, even with a fixed number of workers: without an elastic policy the operator
gives workers no rendezvous address, and with a master it injects an init container that the restricted Pod Security
Standard rejects.
"""

from __future__ import annotations

from manifests.kinds import Object
from manifests.names import Task, job_name, ranks_per_pod, replicas
from manifests.objects import pod_template
from manifests.spec import JobSpec


def job_spec(job: JobSpec, task: Task) -> Object:
    cluster = job.cluster
    workers = replicas(job, task)
    return {
        "nprocPerNode": str(ranks_per_pod(job, task)),
        "elasticPolicy": {
            "minReplicas": workers,
            "maxReplicas": workers,
            "rdzvBackend": "c10d",
            "rdzvId": job_name(job, task),
            # A worker may wait for the others' images and nodes as long as the launcher does.
            "rdzvConf": [{"key": "join_timeout", "value": str(cluster.start_timeout_seconds)}],
            # The entrypoint translates exit codes and keeps the restart budget; torchrun's restarts would hide both.
            "maxRestarts": 0,
        },
        "runPolicy": {
            # The default None would keep the other workers, and their GPUs, running after one has failed.
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": cluster.ttl_seconds_after_finished,
            "activeDeadlineSeconds": cluster.deadline_seconds,
            # Used if the operator has a gang scheduler: no worker holds GPUs while others wait for theirs.
            "schedulingPolicy": {"minAvailable": workers},
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
