"""The state of jobs, pods and events of a cluster. Pure functions over the API's objects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from manifests.kinds import CONTAINERS, PYTORCHJOB, TRAINJOB, Object, kind_of

Phase = Literal["queued", "starting", "running"]
LONGEST_MESSAGE_CHARACTERS = 600
# Of the training operator; the reason of Trainer's TrainJob and of a Job.
DEADLINE_PASSED = re.compile(r"longer than specified deadline|DeadlineExceeded")


def has_condition(job: Object, condition: str) -> bool:
    return any(c["type"] == condition and c["status"] == "True" for c in job.get("status", {}).get("conditions", []))


def condition_message(job: Object, condition: str) -> str:
    found = [c for c in job.get("status", {}).get("conditions", []) if c["type"] == condition]
    return one_line(found[-1].get("message", "")) if found else ""


def is_past_deadline(job: Object) -> bool:
    """Whether it has failed because its activeDeadlineSeconds, or those of its Job, have passed."""
    failed = [c for c in job.get("status", {}).get("conditions", []) if c["type"] == "Failed" and c["status"] == "True"]
    return any(DEADLINE_PASSED.search(f"{c.get('reason', '')} {c.get('message', '')}") for c in failed)


def is_active(job: Object) -> bool:
    return not has_succeeded(job) and not has_condition(job, "Failed")


def has_succeeded(job: Object) -> bool:
    return has_condition(job, kind_of(job).succeeded)


def is_suspended(job: Object) -> bool:
    """Whether a person or a queue has set spec.suspend; the condition follows later."""
    return bool(job["spec"].get("suspend") or job["spec"].get("runPolicy", {}).get("suspend"))


def is_running(job: Object) -> bool:
    """Whether its workers have started; a TrainJob shows only their number."""
    if kind_of(job) is TRAINJOB:
        return any(child.get("ready") for child in job.get("status", {}).get("jobsStatus", []))
    return has_condition(job, "Running")


def phase_of(pods: Iterable[Object], workers: int) -> Phase:
    """`queued` until every worker has a node, `starting` until every container has started."""
    pods = list(pods)
    if sum(bool(pod["spec"].get("nodeName")) for pod in pods) < workers:
        return "queued"
    if sum(has_started(pod) for pod in pods) < workers:
        return "starting"
    return "running"


def has_started(pod: Object) -> bool:
    state = container_state(pod)
    return "running" in state or "terminated" in state


def is_over(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def container_status(pod: Object) -> Object:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    named = (status for status in statuses if status["name"] in CONTAINERS)
    return next(named, statuses[0] if statuses else {})


def container_state(pod: Object) -> Object:
    return container_status(pod).get("state", {})


def container(pod: Object) -> Object:
    """The training container, even if a service mesh has injected a sidecar."""
    containers = pod["spec"]["containers"]
    return next((each for each in containers if each["name"] in CONTAINERS), containers[0])


def is_about(event: Object, job: Object) -> bool:
    """Whether an event concerns the job, one of its pods or an object in between, not a former job of that name."""
    kind, metadata, about = kind_of(job), job["metadata"], event.get("involvedObject", {})
    if about.get("kind") == kind.kind:
        return about.get("uid") == metadata["uid"]
    time = event_time(event)
    if about.get("kind") == "Pod":
        is_its = about.get("name", "").startswith(kind.worker_name(metadata["name"], ""))
    else:
        is_its = about.get("name", "") == kind.child_name(about.get("kind", ""), metadata["name"])
    return is_its and time[:19] >= metadata["creationTimestamp"][:19]


def event_time(event: Object) -> str:
    """Its last time in UTC, sortable as text to the second; events of the newer API have only eventTime."""
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]


def is_news(event: Object) -> bool:
    """Whether an event adds to what the state of job and pods says."""
    reason = event.get("reason") or ""
    about = event.get("involvedObject", {}).get("kind")
    if about in (TRAINJOB.kind, *(child for child, _ in TRAINJOB.children)):
        return False
    if about == PYTORCHJOB.kind:
        return not reason.startswith("PyTorchJob") and "Error pod" not in event.get("message", "")
    return reason not in ("FailedScheduling", "Failed", "BackOff", "InspectFailed")


def running_seconds(job: Object) -> float:
    """Seconds since its workers started, by its condition; for a TrainJob, which has none, its age."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == "Running" and condition["status"] == "True" and condition.get("lastTransitionTime"):
            began = datetime.fromisoformat(condition["lastTransitionTime"])
            return max(0.0, (datetime.now(UTC) - began).total_seconds())
    return age_seconds(job)


def age_seconds(job: Object) -> float:
    """Seconds since the job started, according to the cluster; a suspended or resumed job starts again at 0.

    A suspended PyTorchJob keeps the startTime of before.
    """
    status = job.get("status", {})
    changed = [c for c in status.get("conditions", []) if c["type"] == "Suspended"]
    stamp = "" if changed and changed[-1]["status"] == "True" else status.get("startTime")
    stamp = stamp or (changed and changed[-1]["lastTransitionTime"]) or job["metadata"]["creationTimestamp"]
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds())


def one_line(text: str) -> str:
    """Lines joined by ` | `; a long text is cut to its end, where logs report the error."""
    joined = " | ".join(line.strip() for line in (text or "").splitlines() if line.strip())
    return joined if len(joined) <= LONGEST_MESSAGE_CHARACTERS else "…" + joined[-LONGEST_MESSAGE_CHARACTERS:]
