"""Read what Kueue knows of a job: its Workload, and its place among those that wait.

Nothing here is needed to run a job; an account without these rights learns less of why a job waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from components.cluster import state
from components.cluster.api import Cluster, Refused
from manifests import queue
from manifests.kinds import QUEUE_LABEL, Object


@dataclass(frozen=True)
class Position:
    """A job's place among those that wait, from 1: in its LocalQueue, where `waiting` jobs wait, and in the
    ClusterQueue behind it, which other namespaces share."""

    place: int
    waiting: int
    in_cluster_queue: int


@dataclass(frozen=True)
class InQueue:
    """What Kueue says of one job.

    Attributes:
        workload: None if there is none, or it cannot be read.
        position: None for a job that does not wait, or if it cannot be read.
        unread: why the Workload cannot be read; "" if it can.
        absent_class: the priority class that the job names and that does not exist.
        preemptor: the job of this namespace that took its place.
    """

    workload: Object | None = None
    position: Position | None = None
    unread: str = ""
    absent_class: str = ""
    preemptor: str = ""


def look(cluster: Cluster, job: Object, others: Iterable[Object] = ()) -> InQueue | None:
    """None for a job without a queue.

    Args:
        others: jobs among which to find the one that preempted it.

    Raises:
        LaunchError: the API server cannot be reached.
    """
    labels = job["metadata"].get("labels", {})
    if QUEUE_LABEL not in labels:
        return None
    try:
        version = served(cluster)
        if version is None:
            return InQueue(unread=unknown_version(cluster))
        workload = _workload(cluster, version, job["metadata"]["uid"])
    except Refused as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return InQueue(unread="the cluster has no Kueue")
        return InQueue(unread=str(error))
    if workload is None:
        name = labels.get(queue.PRIORITY_LABEL, "")
        return InQueue(absent_class=name if name and _is_absent(cluster, version, name) else "")
    taken_by = preemptor_uid(workload)
    named = [other["metadata"]["name"] for other in others if taken_by and other["metadata"]["uid"] == taken_by]
    position = _position(cluster, labels[QUEUE_LABEL], job["metadata"]["uid"]) if state.is_suspended(job) else None
    return InQueue(workload, position, preemptor=named[0] if named else "")


def served(cluster: Cluster) -> str | None:
    """The newest version of Kueue's API that the cluster serves and we know; None if it serves only others.

    Raises:
        Refused: with status 404, the cluster has no Kueue.
    """
    return queue.version_of(_versions(cluster))


def unknown_version(cluster: Cluster) -> str:
    """What to say of a Kueue none of whose versions we know."""
    return (
        f"this cluster's Kueue serves {queue.GROUP} only as {', '.join(_versions(cluster))}, but this yaongi knows "
        f"{' and '.join(queue.VERSIONS)}; update yaongi, or look with: kubectl describe workloads"
    )


def preemptor_uid(workload: Object) -> str:
    """UID of the job that preempted this one; "" if none did, or it has its place back."""
    for condition in workload.get("status", {}).get("conditions", []):
        if condition["type"] == "Preempted" and condition["status"] == "True":
            return condition.get("message", "").partition("JobUID: ")[2].partition(")")[0]
    return ""


def workload_of(cluster: Cluster, job: Object) -> Object | None:
    """The Workload of a job; None without one, and where it cannot be read."""
    found = look(cluster, job)
    return found.workload if found else None


def activate(cluster: Cluster, workload: Object) -> None:
    """Let a deactivated Workload wait for admission again.

    Raises:
        LaunchError: the account may not.
    """
    version = workload["apiVersion"].rpartition("/")[2]
    place = (queue.GROUP, version, cluster.namespace, "workloads", workload["metadata"]["name"])
    body = {"spec": {"active": True}}
    cluster.call("patch workloads", cluster.custom.patch_namespaced_custom_object, *place, body)


def _versions(cluster: Cluster) -> list[str]:
    return [each["version"] for each in _get(cluster, f"/apis/{queue.GROUP}")["versions"]]


def _workload(cluster: Cluster, version: str, uid: str) -> Object | None:
    call = cluster.custom.list_namespaced_custom_object
    place = (queue.GROUP, version, cluster.namespace, "workloads")
    found = cluster.call("list workloads", call, *place, label_selector=f"{queue.JOB_UID_LABEL}={uid}")["items"]
    return {"apiVersion": f"{queue.GROUP}/{version}", **found[0]} if found else None


def _position(cluster: Cluster, local_queue: str, uid: str) -> Position | None:
    """From Kueue's visibility API, which a cluster may lack or not grant."""
    for version in queue.VERSIONS:
        path = f"/apis/{queue.VISIBILITY_GROUP}/{version}/namespaces/{cluster.namespace}/localqueues/{local_queue}"
        try:
            pending = _get(cluster, f"{path}/pendingworkloads").get("items") or []
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:  # an older Kueue, or no such queue
                continue
            return None
        for each in pending:
            if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences", [])):
                places = each["positionInLocalQueue"] + 1, len(pending), each["positionInClusterQueue"] + 1
                return Position(*places)
        return None
    return None


def _is_absent(cluster: Cluster, version: str, priority_class: str) -> bool:
    try:
        _get(cluster, f"/apis/{queue.GROUP}/{version}/workloadpriorityclasses/{priority_class}")
    except Refused as error:
        return error.status == HTTPStatus.NOT_FOUND
    return False


def _get(cluster: Cluster, path: str) -> Any:
    """The answer to GET of any path; the client has no typed calls for these."""
    call = cluster.core.api_client.call_api
    options = {"response_type": "object", "auth_settings": ["BearerToken"], "_return_http_data_only": True}
    headers = {"Accept": "application/json"}
    return cluster.call(f"get {path}", call, path, "GET", header_params=headers, **options)
