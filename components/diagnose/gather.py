"""Read from a cluster what explains one job: the job, pods, events, claims, what Kueue says, nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from components.cluster import kueue, state
from components.cluster.api import Cluster, Refused
from components.cluster.kueue import InQueue
from components.diagnose.why import Situation
from manifests.kinds import KINDS, JobKind, Object, kind_of


def jobs(cluster: Cluster) -> list[Object]:
    """All PyTorchJobs and TrainJobs of the namespace; none for a kind that the cluster lacks."""
    found: list[Object] = []
    for kind in KINDS.values():
        found += [job | {"kind": kind.kind} for job in _items(cluster, kind)]
    return found


def _items(cluster: Cluster, kind: JobKind) -> list[Object]:
    try:
        return cluster.jobs(kind)
    except Refused as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return []
        raise


def situation(cluster: Cluster, name: str, job: Object | None = None) -> Situation:
    """All objects about the job `name`; `job` is None if it does not exist (any more).

    Args:
        job: the job as just listed; None to list all jobs and find it.

    Raises:
        LaunchError: the API server cannot be reached, or jobs and pods may not be read. Other objects that may not be
            read are left out.
    """
    job = job or next((each for each in jobs(cluster) if each["metadata"]["name"] == name), None)
    kinds = [kind_of(job)] if job else list(KINDS.values())
    pods = [pod for kind in kinds for pod in cluster.pods(kind, name)]
    claims = _claims(cluster, pods)
    waiting = any(not state.has_started(pod) or "deletionTimestamp" in pod["metadata"] for pod in pods)
    return Situation(
        name,
        cluster.namespace,
        job,
        pods,
        _events(cluster, name, job, {item["metadata"]["uid"] for item in (*pods, *claims)}),
        claims,
        _queue(cluster, job) if job else None,
        _listed(cluster, "list nodes", cluster.core.list_node) if waiting else [],
    )


def _events(cluster: Cluster, name: str, job: Object | None, uids: set[str]) -> list[Object]:
    events = _listed(cluster, "list events", cluster.core.list_namespaced_event, cluster.namespace)
    if job is None:
        plural = {kind.kind for kind in KINDS.values()}
        about = [e for e in events if e["involvedObject"].get("kind") in plural and e["involvedObject"]["name"] == name]
        return about or [event for event in events if event["involvedObject"].get("uid") in uids]
    return [e for e in events if e["involvedObject"].get("uid") in uids or state.is_about(e, job)]


def _claims(cluster: Cluster, pods: list[Object]) -> list[Object]:
    named = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods
        for volume in pod["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    if not named:
        return []
    read = cluster.core.list_namespaced_persistent_volume_claim
    claims = _listed(cluster, "list persistentvolumeclaims", read, cluster.namespace)
    return [claim for claim in claims if claim["metadata"]["name"] in named]


def _queue(cluster: Cluster, job: Object) -> InQueue | None:
    """What Kueue says of a job that its queue holds back."""
    found = kueue.look(cluster, job) if state.is_suspended(job) else None
    if found and found.workload and kueue.preemptor_uid(found.workload):
        return kueue.look(cluster, job, jobs(cluster))
    return found


def _listed(cluster: Cluster, doing: str, call: Callable[..., Any], *args: Any) -> list[Object]:
    """Items of a core resource; [] where reading is forbidden."""
    try:
        return json.loads(cluster.call(doing, call, *args, _preload_content=False).data)["items"]
    except Refused:
        return []
