"""Describe what blocks a pod and how a worker ended. Pure functions over the API's objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from components.cluster.state import container, container_state, one_line
from components.diagnose.causes import CONFIG, CREATION, IMAGE, SCHEDULING, Obstacle, exit_meaning, fix_for
from manifests.kinds import TRAINJOB, Object
from trainer.exitcodes import retryable

HOPELESS_WAITING = {"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
IMAGE_WAITING = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
CONFIG_WAITING = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
CREATION_FAILURES = {
    *("FailedCreatePod", "FailedCreateService", "FailedCreate"),
    *("TrainJobResourcesCreationFailed", "JobCreationFailed"),  # Trainer's, JobSet's
}
# What passes by itself: a service that exists although the operator's cache lacks it; a JobSet that Trainer 2.3 may not
# change while it stops for a queue; a former job's copy of its runtime, until it is collected;
# a job that Kueue's cache lacks when what belongs to it is made, down to its first pod.
HARMLESS = re.compile(
    r'already exists|template\.metadata: Invalid value: "?null|a snapshot configmap exists but is owned by|'
    r'"m(?:pod|job|jobset)\.kb\.io" denied the request: \S+ "[^"]+" not found'
)
# The random name of a pod that a Job creates again and again; without it, repeated refusals are the same text.
RANDOM_SUFFIX = re.compile(rf'(?<=-{TRAINJOB.worker}-)(?P<index>\d+)-[a-z0-9]{{5}}(?=")')


AFTER_DEADLINE = "raise it (cluster.run_timeout_seconds) and start the job again; it continues from its last checkpoint"


def obstacle(pod: Object) -> Obstacle | None:
    """Why the container of a pod does not start; None if nothing blocks it."""
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
            # The rest is about preemption, and long.
            message = re.split(r" preemption: | no new claims to deallocate", one_line(condition.get("message", "")))[0]
            return Obstacle(f"cannot be scheduled: {message}", fix_for(SCHEDULING, message, several=True)[0])
    return None


def creation_obstacle(event: Object) -> Obstacle | None:
    """A controller could not create a pod or service: quota, Pod Security, an admission webhook."""
    message = RANDOM_SUFFIX.sub(r"\g<index>", one_line(event.get("message", "")))
    if event.get("reason") not in CREATION_FAILURES or HARMLESS.search(message):
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
    """Kubernetes' rule: a toleration without a key is for all taints, without an effect for all effects."""
    same_key = not toleration.get("key") or toleration["key"] == taint["key"]
    same_effect = not toleration.get("effect") or toleration["effect"] == taint["effect"]
    same_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return same_key and same_effect and same_value


@dataclass(frozen=True)
class Exit:
    """How a worker ended."""

    pod: str
    node: str
    code: int | None  # None: the pod is gone but its container never ended (eviction, node loss)
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
        """Whether the operator fails the job for it instead of recreating the pod."""
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
    """The reason in the JSON object that the trainer's entrypoint writes; any other text as one line."""
    try:
        return one_line(json.loads(termination_message)["reason"])
    except (TypeError, ValueError, KeyError):
        return one_line(termination_message)


def culprit(exits: Iterable[Exit]) -> Exit | None:
    """The exit that ended the job: the first final one; the others are mostly consequences."""
    failed = [found for found in exits if found.code != 0]
    final = [found for found in failed if found.final]
    return min(final or failed, key=lambda found: found.finished, default=None)


def _detail(message: str) -> str:
    return f": {message}" if message else ""
