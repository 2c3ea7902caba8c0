"""What the state of pods and events means to a person. Pure functions over the API's objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from components.launch.kubernetes_causes import CONFIG, CREATION, IMAGE, SCHEDULING, Obstacle, exit_meaning, fix_for
from manifests.kinds import CONTAINERS, PYTORCHJOB, TRAINJOB, Object, kind_of
from trainer.exitcodes import retryable

Phase = Literal["queued", "starting", "running"]
LONGEST_MESSAGE_CHARACTERS = 600

HOPELESS_WAITING = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
IMAGE_WAITING = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
CONFIG_WAITING = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
CREATION_FAILURES = {"FailedCreatePod", "FailedCreateService", "FailedCreate", "TrainJobResourcesCreationFailed"}
# Of a pod that a Job tries to make again and again; without it the same refusal has the same words.
RANDOM_SUFFIX = re.compile(rf'(?<=-{TRAINJOB.worker}-)(?P<index>\d+)-[a-z0-9]{{5}}(?=")')


def has_condition(job: Object, condition: str) -> bool:
    return any(c["type"] == condition and c["status"] == "True" for c in job.get("status", {}).get("conditions", []))


def condition_message(job: Object, condition: str) -> str:
    found = [c for c in job.get("status", {}).get("conditions", []) if c["type"] == condition]
    return one_line(found[-1].get("message", "")) if found else ""


def is_active(job: Object) -> bool:
    return not has_succeeded(job) and not has_condition(job, "Failed")


def has_succeeded(job: Object) -> bool:
    return has_condition(job, kind_of(job).succeeded)


def is_suspended(job: Object) -> bool:
    """Whether somebody, or a queue, wants it so; the condition follows later."""
    return bool(job["spec"].get("suspend") or job["spec"].get("runPolicy", {}).get("suspend"))


def is_running(job: Object) -> bool:
    """Whether its workers have started; a TrainJob says so by their number only."""
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
    """The training container, also where a mesh has put another beside it."""
    containers = pod["spec"]["containers"]
    return next((each for each in containers if each["name"] in CONTAINERS), containers[0])


def obstacle(pod: Object) -> Obstacle | None:
    """Why the container of a pod does not start; None while nothing hinders it."""
    waiting = container_state(pod).get("waiting", {})
    reason, message = waiting.get("reason", ""), one_line(waiting.get("message", ""))
    if reason in IMAGE_WAITING:
        image = container(pod)["image"]
        fix, hopeless = fix_for(IMAGE, f"{image} {reason} {message}")
        text = f"image '{image}' cannot be pulled ({reason}: {message})"
        return Obstacle(text, fix or "check cluster.image", hopeless or reason in HOPELESS_WAITING, pulling=True)
    if reason in CONFIG_WAITING:
        fix, _ = fix_for(CONFIG, message)
        return Obstacle(f"container cannot be made ({reason}: {message})", fix, reason in HOPELESS_WAITING)
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            # What follows is about preemption, and long.
            message = re.split(r" preemption: | no new claims to deallocate", one_line(condition.get("message", "")))[0]
            return Obstacle(f"cannot be scheduled: {message}", fix_for(SCHEDULING, message, several=True)[0])
    return None


def creation_obstacle(event: Object) -> Obstacle | None:
    """A controller could not create a pod or service: quota, Pod Security, an admission webhook."""
    message = RANDOM_SUFFIX.sub(r"\g<index>", one_line(event.get("message", "")))
    # Of a service that is there already the operator only had not heard yet.
    if event.get("reason") not in CREATION_FAILURES or "already exists" in message:
        return None
    fix, hopeless = fix_for(CREATION, message)
    return Obstacle(f"a worker cannot be created: {message}", fix, hopeless)


def mount_obstacle(event: Object) -> Obstacle | None:
    """The kubelet could not mount a volume of a pod."""
    if event.get("reason") not in ("FailedMount", "FailedAttachVolume"):
        return None
    message = one_line(event.get("message", ""))
    return Obstacle(f"a volume cannot be mounted: {message}", fix_for(CONFIG, message)[0])


def tolerates(toleration: Object, taint: Object) -> bool:
    """Kubernetes' rule: without a key it is for all taints, without an effect for all effects."""
    same_key = not toleration.get("key") or toleration["key"] == taint["key"]
    same_effect = not toleration.get("effect") or toleration["effect"] == taint["effect"]
    same_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return same_key and same_effect and same_value


@dataclass(frozen=True)
class Exit:
    """How a worker ended."""

    pod: str
    node: str
    code: int | None  # None: the pod went without its container having ended (eviction, node loss)
    reason: str
    message: str
    finished: str

    def describe(self) -> str:
        where = f"{self.pod} on node {self.node or '(none)'}"
        if self.code is None:
            return f"{where}: {self.reason or 'lost'}{_detail(self.message)}"
        return f"{where} exited {self.code} ({self.meaning}){_detail(self.message)}"

    @property
    def final(self) -> bool:
        """Whether the operator ends the job for it instead of recreating the pod."""
        return self.code is not None and self.code != 0 and not retryable(self.code)

    @property
    def meaning(self) -> str:
        return exit_meaning(self.code, self.reason)


def exit_of(pod: Object) -> Exit | None:
    """None while the pod has not ended."""
    metadata, status = pod["metadata"], pod.get("status", {})
    ended = container_state(pod).get("terminated")
    node = pod["spec"].get("nodeName", "")
    if ended is not None:
        message = own_reason(ended.get("message", ""))
        reason, finished = ended.get("reason", ""), ended.get("finishedAt") or ""
        return Exit(metadata["name"], node, ended["exitCode"], reason, message, finished)
    if status.get("phase") == "Failed":
        message = one_line(status.get("message", ""))
        return Exit(metadata["name"], node, None, status.get("reason", ""), message, "")
    return None


def own_reason(termination_message: str) -> str:
    """The reason in what the trainer's entrypoint writes, a JSON object; any other text as one line."""
    try:
        return one_line(json.loads(termination_message)["reason"])
    except (TypeError, ValueError, KeyError):
        return one_line(termination_message)


def culprit(exits: Iterable[Exit]) -> Exit | None:
    """The exit that ended the job: the first that is final; the others' are mostly its consequences."""
    failed = [found for found in exits if found.code != 0]
    final = [found for found in failed if found.final]
    return min(final or failed, key=lambda found: found.finished, default=None)


def is_about(event: Object, job: Object) -> bool:
    """Whether an event concerns the job, a pod of it or what stands between, and not a former job of the same name."""
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
    """Its last time, UTC, sortable as text to the second; events of the newer API have it in eventTime only."""
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]


def is_news(event: Object) -> bool:
    """Whether an event says what the state of job and pods does not say already."""
    reason = event.get("reason") or ""
    about = event.get("involvedObject", {}).get("kind")
    if about in (TRAINJOB.kind, *(child for child, _ in TRAINJOB.children)):
        return False
    if about == PYTORCHJOB.kind:
        return not reason.startswith("PyTorchJob") and "Error pod" not in event.get("message", "")
    return reason not in ("FailedScheduling", "Failed", "BackOff", "InspectFailed")


def running_seconds(job: Object) -> float:
    """Seconds since its workers run, by its condition; a TrainJob has none, and its age counts."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == "Running" and condition["status"] == "True" and condition.get("lastTransitionTime"):
            began = datetime.fromisoformat(condition["lastTransitionTime"])
            return max(0.0, (datetime.now(UTC) - began).total_seconds())
    return age_seconds(job)


def age_seconds(job: Object) -> float:
    """Seconds since the job started by the cluster's own account (a resumed job starts anew)."""
    status = job.get("status", {})
    resumed = [c["lastTransitionTime"] for c in status.get("conditions", []) if c["type"] == "Suspended"]
    stamp = status.get("startTime") or (resumed and resumed[-1]) or job["metadata"]["creationTimestamp"]
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds())


def one_line(text: str) -> str:
    """Lines joined by ` | `; of a long text the end, where logs say what went wrong."""
    joined = " | ".join(line.strip() for line in (text or "").splitlines() if line.strip())
    return joined if len(joined) <= LONGEST_MESSAGE_CHARACTERS else "…" + joined[-LONGEST_MESSAGE_CHARACTERS:]


def _detail(message: str) -> str:
    return f": {message}" if message else ""
