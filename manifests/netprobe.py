"""The objects of `yaongi doctor --network`: two pods that look like a job's workers, a stranger, the job's policy.

All belong to one Job that has a time limit and deletes itself, so that nothing stays even if their maker is killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from manifests.kinds import Object
from manifests.names import RUN_LABEL, job_name, labels
from manifests.network import worker_policy
from manifests.objects import USER_ID, metrics_ports, without_rights
from manifests.spec import JobSpec

Role = Literal["worker", "peer", "stranger"]
ROLE_LABEL = "yaongi/doctor"
RANK_PORT = 29400  # torchrun's rendezvous; ranks use others besides
LIFE_SECONDS = 180
PULL_POLICY = "IfNotPresent"


def ports(job: JobSpec) -> list[int]:
    """Where the worker listens: a port for ranks only, and the first one with metrics, which anybody may read."""
    return [RANK_PORT, *(port["containerPort"] for port in metrics_ports(job, "train")[:1])]


def owner(job: JobSpec, image: str, program: str) -> Object:
    """The Job whose pod is the worker; it owns the other objects."""
    arguments = ["serve", str(LIFE_SECONDS), *map(str, ports(job))]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(job), "labels": {ROLE_LABEL: "job", "app.kubernetes.io/part-of": "yaongi"}},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": LIFE_SECONDS,
            "ttlSecondsAfterFinished": 10,
            "template": {"metadata": {"labels": _labels(job, "worker")}, "spec": _spec(image, program, arguments)},
        },
    }


def policy(job: JobSpec, owned_by: Object) -> Object:
    """The policy that a launcher would make for these workers."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": job_name(job), "ownerReferences": [owned_by]},
        "spec": worker_policy(job, "train"),
    }


def pod(job: JobSpec, role: Role, image: str, program: str, arguments: Sequence[str], owned_by: Object) -> Object:
    """A pod that tries connections and ends: a second worker of the job, or a stranger to it."""
    metadata = {"name": f"{job_name(job)}-{role}", "labels": _labels(job, role), "ownerReferences": [owned_by]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": _spec(image, program, arguments)}


def _labels(job: JobSpec, role: Role) -> dict[str, str]:
    """A worker's own labels; of the stranger only those by which it is found, and which no policy selects."""
    found = labels(job, "train")
    return {ROLE_LABEL: role} | ({RUN_LABEL: job.run_name} if role == "stranger" else found)


def _spec(image: str, program: str, arguments: Sequence[str]) -> Object:
    limits = {"memory": "128Mi"}
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "activeDeadlineSeconds": LIFE_SECONDS,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "probe",
                "image": image,
                "imagePullPolicy": PULL_POLICY,
                "command": ["python", "-c", program, *arguments],
                "resources": {"requests": {"cpu": "20m", **limits}, "limits": limits},
                "securityContext": without_rights(),
            }
        ],
    }
