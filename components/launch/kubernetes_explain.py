"""What the state of pods and events means to a person. Pure functions over the API's objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from manifests.kinds import CONTAINERS, PYTORCHJOB, TRAINJOB, Object, kind_of
from trainer.exitcodes import MEANING, ExitCode, retryable

Phase = Literal["queued", "starting", "running"]
LONGEST_MESSAGE_CHARACTERS = 600

# An image that is absent does not appear by waiting; other pull errors (a registry that is down) may pass.
HOPELESS_WAITING = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
IMAGE_WAITING = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
ABSENT_IMAGE_WORDS = ("not found", "does not exist", "manifest unknown", "denied", "unauthorized", "no such host")
CREATION_FAILURES = {"FailedCreatePod", "FailedCreateService", "FailedCreate", "TrainJobResourcesCreationFailed"}
# Of a pod that a Job tries to make again and again; without it the same refusal has the same words.
RANDOM_SUFFIX = re.compile(rf'(?<=-{TRAINJOB.worker}-)(?P<index>\d+)-[a-z0-9]{{5}}(?=")')
# Refusals of the pod itself, which no amount of waiting turns into a pod.
HOPELESS_CREATION_WORDS = (
    "violates PodSecurity",
    "Invalid value",
    "is invalid",
    "denied the request",
    "serviceaccount",
)


def has_condition(job: Object, condition: str) -> bool:
    return any(c["type"] == condition and c["status"] == "True" for c in job.get("status", {}).get("conditions", []))


def condition_message(job: Object, condition: str) -> str:
    found = [c for c in job.get("status", {}).get("conditions", []) if c["type"] == condition]
    return one_line(found[-1].get("message", "")) if found else ""


def is_active(job: Object) -> bool:
    return not has_condition(job, kind_of(job).succeeded) and not has_condition(job, "Failed")


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
    return next((status for status in statuses if status["name"] in CONTAINERS), {})


def container_state(pod: Object) -> Object:
    return container_status(pod).get("state", {})


def container(pod: Object) -> Object:
    """The training container, also where a mesh has put another beside it."""
    return next(container for container in pod["spec"]["containers"] if container["name"] in CONTAINERS)


@dataclass(frozen=True)
class Obstacle:
    """Why a pod does not run; `hopeless` if waiting cannot help, `pulling` if its image is the reason."""

    text: str
    hopeless: bool
    pulling: bool = False


def obstacle(pod: Object) -> Obstacle | None:
    waiting = container_state(pod).get("waiting", {})
    reason, message = waiting.get("reason", ""), one_line(waiting.get("message", ""))
    if reason in IMAGE_WAITING:
        text = (
            f"image '{container(pod)['image']}' cannot be pulled ({reason}: {message}); "
            "check cluster.image, and that the nodes can reach its registry"
        )
        absent = any(word in message.lower() for word in ABSENT_IMAGE_WORDS)
        return Obstacle(text, reason in HOPELESS_WAITING or absent, pulling=True)
    if reason in HOPELESS_WAITING:
        return Obstacle(f"container cannot be made ({reason}: {message})", True)
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return Obstacle(f"cannot be scheduled: {one_line(condition.get('message', ''))}", False)
    return None


def creation_obstacle(event: Object) -> Obstacle | None:
    """The operator could not create a pod or service: quota, Pod Security, an admission webhook."""
    if event.get("reason") not in CREATION_FAILURES:
        return None
    message = RANDOM_SUFFIX.sub(r"\g<index>", one_line(event.get("message", "")))
    return Obstacle(f"a worker cannot be created: {message}", any(word in message for word in HOPELESS_CREATION_WORDS))


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
        if self.reason == "OOMKilled":
            return "out of memory; raise cluster.memory_gib_per_node or lower train.batch.micro_batch_rows"
        if self.code in list(ExitCode):
            return MEANING[ExitCode(self.code)]
        return self.reason or "unknown exit code"


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
    # Both are UTC to the second and sort as text; events of the newer API have a time in eventTime only.
    time = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    if about.get("kind") == "Pod":
        is_its = about.get("name", "").startswith(kind.worker_name(metadata["name"], ""))
    else:
        is_its = about.get("name", "") == kind.child_name(about.get("kind", ""), metadata["name"])
    return is_its and time[:19] >= metadata["creationTimestamp"][:19]


def is_news(event: Object) -> bool:
    """Whether an event says what the state of job and pods does not say already."""
    reason = event.get("reason") or ""
    about = event.get("involvedObject", {}).get("kind")
    if about in (TRAINJOB.kind, *(child for child, _ in TRAINJOB.children)):
        return False
    if about == PYTORCHJOB.kind:
        return not reason.startswith("PyTorchJob") and "Error pod" not in event.get("message", "")
    return reason not in ("FailedScheduling", "Failed", "BackOff", "InspectFailed")


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
