"""Why a job does not run, or how it ended, in one sentence with a remedy. Pure functions over the API's objects.

Works for all PyTorchJobs and TrainJobs, ours or not. The first check with an answer wins: the whole job (gone, ended,
suspended) before single pods, and a reason from the cluster before a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from components.cluster import state
from components.cluster.kueue import InQueue
from components.diagnose import explain
from components.diagnose.causes import Obstacle, exit_meaning
from components.diagnose.queued import queued
from manifests.kinds import Object, kind_of

State = Literal["gone", "ending", "succeeded", "failed", "suspended", "queued", "starting", "restarting", "running"]
PATIENCE_SECONDS = 15  # how long a controller or a kubelet may take before its silence is a symptom
# The training operator's event for a worker's exit; the pod itself is replaced at once.
EXIT_EVENT = re.compile(r"Error pod (\S+) container \S+ exitCode: (\d+) terminated message: (.*)", re.S)


@dataclass(frozen=True)
class Situation:
    """All objects about one job. Lists are empty if there are none or reading is forbidden.

    Attributes:
        job: None when it is gone.
        events: about the job, the objects its controller created, its pods and their claims; in any order.
        claims: the claims that its pods name.
        queue: what Kueue says of a job in a queue; None for any other job.
        nodes: all nodes.
    """

    name: str
    namespace: str
    job: Object | None
    pods: list[Object] = field(default_factory=list)
    events: list[Object] = field(default_factory=list)
    claims: list[Object] = field(default_factory=list)
    queue: InQueue | None = None
    nodes: list[Object] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.job["kind"] if self.job else "job"

    @property
    def workers(self) -> int:
        """The number of workers of any job, also with a master, or if the runtime sets the number of nodes."""
        spec = (self.job or {}).get("spec", {})
        if "pytorchReplicaSpecs" in spec:
            return sum(replica.get("replicas", 1) for replica in spec["pytorchReplicaSpecs"].values())
        return spec.get("trainer", {}).get("numNodes") or max(len(self.pods), 1)

    def about(self, uid: str) -> list[Object]:
        """The events about one object, newest last."""
        mine = [event for event in self.events if event["involvedObject"].get("uid") == uid]
        return sorted(mine, key=state.event_time)


@dataclass(frozen=True)
class Answer:
    """`sentence` describes the state, `fix` what to do about it ("" if nothing)."""

    state: State
    sentence: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.sentence}" + (f"; {self.fix}" if self.fix else "")


def why(found: Situation, now: datetime | None = None) -> Answer:
    """The answer for a job that exists or existed."""
    now = now or datetime.now(UTC)
    looks: tuple[Callable[[Situation, datetime], Answer | None], ...] = (
        *(_gone, _ended, _suspended, _without_pods, _terminating, _crashing, _hindered, _restarting, _starting),
    )
    for look in looks:
        if answer := look(found, now):
            return answer
    return _running(found, now)


def _gone(found: Situation, now: datetime) -> Answer | None:
    if found.job is None:
        if found.pods:
            return _terminating(found, now) or Answer("ending", f"it was deleted and {_listed(found.pods)} still end")
        last = max(found.events, key=state.event_time, default=None)
        said = f" (last event, {_age(last, now)} ago: {state.one_line(last.get('message', ''))})" if last else ""
        return Answer("gone", f"the job was deleted, or removed after its time to live{said}", "start it again")
    if "deletionTimestamp" in found.job["metadata"]:
        held = ", ".join(found.job["metadata"].get("finalizers", []))
        waits = f"; it waits for {held}" if held else ""
        return _terminating(found, now) or Answer("ending", f"it is being deleted{waits}")
    return None


def _ended(found: Situation, now: datetime) -> Answer | None:
    job = found.job or {}
    if state.has_succeeded(job):
        return Answer("succeeded", "all workers have finished")
    if not state.has_condition(job, "Failed"):
        return None
    said = state.condition_message(job, "Failed")
    cause = explain.culprit(end for end in map(explain.exit_of, found.pods) if end) or _last_exit(found)
    before = f"; before that {cause.describe()}" if cause else ""
    if state.is_past_deadline(job):
        return Answer("failed", f"its activeDeadlineSeconds have passed{before}", explain.AFTER_DEADLINE)
    if cause is None:
        return Answer("failed", said or "it gives no reason", "its pods are gone; look at the run directory's logs")
    limit = "its backoffLimit is spent: " if "backoff limit" in said else ""
    return Answer("failed", f"{limit}{cause.describe()}", f"the log says more: yaongi logs {found.name}")


def _suspended(found: Situation, now: datetime) -> Answer | None:
    if found.job is None or not state.is_suspended(found.job):
        return None
    if found.queue is not None:
        held = queued(found.job, found.queue, found.namespace, now)
        deactivated = not (found.queue.workload or {}).get("spec", {}).get("active", True)
        return Answer("suspended" if deactivated else "queued", held.text, held.fix)
    spec = found.job["spec"]
    patch = '{"spec":{"suspend":false}}' if "suspend" in spec else '{"spec":{"runPolicy":{"suspend":false}}}'
    resume = f"kubectl patch {found.kind.lower()} {found.name} -n {found.namespace} --type merge -p '{patch}'"
    return Answer("suspended", "someone has suspended it", f"resume it: {resume}")


def _without_pods(found: Situation, now: datetime) -> Answer | None:
    """Fewer pods than workers: they cannot be created, or no controller tries."""
    if len(found.pods) >= found.workers:
        return None
    for event in sorted(found.events, key=state.event_time, reverse=True):
        if obstacle := explain.creation_obstacle(event):
            some = f"{len(found.pods)} of {found.workers} workers exist; " if found.pods else ""
            return Answer("queued", some + obstacle.text, obstacle.fix)
    job = found.job or {}
    if found.pods or job.get("status", {}).get("conditions"):
        return None
    if manager := _managed_by(job):
        return Answer("queued", f"it is left to '{manager}' (managedBy)", f"check that {manager} runs, or remove it")
    operator = kind_of(job).operator
    if (age := state.age_seconds(job)) < PATIENCE_SECONDS:
        return Answer("queued", f"it was created {age:.0f} s ago and {operator} has not taken it up yet")
    return Answer(
        "queued",
        f"{operator} has not taken it up for {age:.0f} s",
        "check that it runs: kubectl get pods -A | grep -E 'training-operator|trainer'",
    )


def _terminating(found: Situation, now: datetime) -> Answer | None:
    """Pods that should be gone; until then their names are taken."""
    stuck = []
    for pod in found.pods:
        if stamp := pod["metadata"].get("deletionTimestamp"):  # the deadline for its end
            late = (now - datetime.fromisoformat(stamp)).total_seconds()
            if late > PATIENCE_SECONDS:
                stuck.append(pod)
    if not stuck:
        return None
    node = stuck[0]["spec"].get("nodeName", "")
    lost = "" if _is_ready(found, node) else ", which does not answer"
    return Answer(
        "ending",
        f"{_listed(stuck)} cannot end: stuck Terminating on node {node}{lost}",
        f"if that node is lost: kubectl delete pod -n {found.namespace} --force --grace-period=0 "
        f"{stuck[0]['metadata']['name']}",
    )


def _crashing(found: Situation, now: datetime) -> Answer | None:
    for pod in found.pods:
        status = state.container_status(pod)
        if status.get("state", {}).get("waiting", {}).get("reason") != "CrashLoopBackOff":
            continue
        last = status.get("lastState", {}).get("terminated", {})
        meaning = exit_meaning(last.get("exitCode"), last.get("reason", ""))
        words = explain.own_reason(last.get("message", ""))
        return Answer(
            "restarting",
            f"{pod['metadata']['name']} keeps crashing, {_times(status['restartCount'])}: exit code "
            f"{last.get('exitCode')} ({meaning})" + (f": {words}" if words else ""),
            f"the log says more: yaongi logs {found.name}",
        )
    return None


def _hindered(found: Situation, now: datetime) -> Answer | None:
    """Pods that exist but cannot start."""
    hindered = [(pod, obstacle) for pod in found.pods if (obstacle := _obstacle(pod, found))]
    if not hindered:
        return None
    pod, obstacle = hindered[0]
    alike = [other for other, same in hindered if same.text == obstacle.text]
    held = sum(bool(other["spec"].get("nodeName")) for other in found.pods)
    waiting = pod["spec"].get("nodeName") is None
    short = f"; short by {found.workers - held} of {found.workers} workers, {held} have a node and wait" if held else ""
    sentence = f"{_listed(alike)} {obstacle.text}{short if waiting else ''}"
    return Answer("queued" if waiting else "starting", sentence, obstacle.fix)


def _obstacle(pod: Object, found: Situation) -> Obstacle | None:
    obstacle = explain.obstacle(pod)
    if obstacle is None and not state.has_started(pod):
        mounts = [hit for hit in map(explain.mount_obstacle, found.about(pod["metadata"]["uid"])) if hit]
        return mounts[-1] if mounts else None
    if obstacle is None or not obstacle.text.startswith("cannot be scheduled"):
        return obstacle
    if "unbound immediate" in obstacle.text and (told := _unbound(found)):
        return Obstacle(f"{obstacle.text} ({told})", obstacle.fix)
    if "untolerated taint" in obstacle.text and (taints := _untolerated(pod, found.nodes)):
        return Obstacle(f"{obstacle.text} ({', '.join(taints)})", obstacle.fix)
    return obstacle


def _unbound(found: Situation) -> str:
    """Claims without a volume, with the last event about them."""
    told = []
    for claim in found.claims:
        if claim.get("status", {}).get("phase") != "Bound":
            about = found.about(claim["metadata"]["uid"])
            last = about[-1].get("message", "no event") if about else "no event"
            told.append(f"claim '{claim['metadata']['name']}': {state.one_line(last)}")
    return "; ".join(told)


def _untolerated(pod: Object, nodes: list[Object]) -> list[str]:
    """Taints that the pod does not tolerate, as `node: key=value:effect`."""
    tolerations = pod["spec"].get("tolerations", [])
    return [
        f"{node['metadata']['name']}: {taint['key']}={taint.get('value', '')}:{taint['effect']}"
        for node in nodes
        for taint in node["spec"].get("taints", [])
        if taint["effect"] != "PreferNoSchedule" and not any(explain.tolerates(each, taint) for each in tolerations)
    ]


def _restarting(found: Situation, now: datetime) -> Answer | None:
    """Workers that failed and are recreated, as under restartPolicy ExitCode."""
    if all(state.has_started(pod) for pod in found.pods) and len(found.pods) == found.workers:
        return None
    last = _last_exit(found)
    if last is None:
        return None
    return Answer(
        "restarting",
        f"a worker is being recreated, {_times(restarts(found))}: {last.describe()}",
        f"log: yaongi logs {found.name}",
    )


def _starting(found: Situation, now: datetime) -> Answer | None:
    waiting = [pod for pod in found.pods if not state.has_started(pod)]
    if len(found.pods) < found.workers:
        return Answer("queued", f"{len(found.pods)} of {found.workers} workers exist; their controller makes the rest")
    if not waiting:
        return None
    pod, node = waiting[0], waiting[0]["spec"].get("nodeName", "")
    if not node:
        return Answer("queued", f"{_listed(waiting)} wait for the scheduler")
    if not _is_ready(found, node):
        fix = f"start the node, or kubectl delete pod {pod['metadata']['name']} -n {found.namespace} to move it"
        return Answer("starting", f"{_listed(waiting)} cannot start: node {node} does not answer", fix)
    about = found.about(pod["metadata"]["uid"])
    if about and about[-1].get("reason") == "Pulling":
        image, age = state.container(pod)["image"], _age(about[-1], now)
        return Answer("starting", f"node {node} pulls the image '{image}', for {age}")
    return Answer("starting", f"{_listed(waiting)} start on node {node}")


def _running(found: Situation, now: datetime) -> Answer:
    job = found.job or {}
    last, age = _last_exit(found), state.age_seconds(job)
    often = f"; restarted, {_times(restarts(found))}: {last.describe()}" if last else ""
    deadline = job.get("spec", {}).get("runPolicy", {}).get("activeDeadlineSeconds")
    late = ""
    if deadline and age > deadline:
        late = (
            f"; its activeDeadlineSeconds passed {age - deadline:.0f} s ago, which the operator sees at a pod's change"
        )
    return Answer("running", f"{found.workers} of {found.workers} workers run, for {age:.0f} s{often}{late}")


def _managed_by(job: Object) -> str:
    """Another controller to which the operator leaves the job; "" for its own name or none."""
    spec = job.get("spec", {})
    manager = spec.get("managedBy") or spec.get("runPolicy", {}).get("managedBy") or ""
    return "" if manager in ("kubeflow.org/training-operator", "trainer.kubeflow.org/trainjob-controller") else manager


def _exit_events(found: Situation) -> list[Object]:
    mine = [event for event in found.events if EXIT_EVENT.match(event.get("message", ""))]
    return sorted(mine, key=state.event_time)


def _last_exit(found: Situation) -> explain.Exit | None:
    for event in reversed(_exit_events(found)):
        pod, code, words = EXIT_EVENT.match(event["message"]).groups()  # type: ignore[union-attr]
        node = next((p["spec"].get("nodeName", "") for p in found.pods if p["metadata"]["name"] == pod), "")
        reason = event.get("reason", "")
        return explain.Exit(pod, node, int(code), reason, explain.own_reason(words), state.event_time(event))
    return None


def restarts(found: Situation) -> int:
    """How often workers were recreated, as far as the cluster remembers; events expire after an hour."""
    attempts = kind_of(found.job).attempt_label if found.job else None
    if attempts:
        return max((int(pod["metadata"]["labels"].get(attempts, 0)) for pod in found.pods), default=0)
    return sum(event.get("count") or 1 for event in _exit_events(found))


def _times(count: int) -> str:
    return "once so far" if count == 1 else f"{count} times so far"


def _is_ready(found: Situation, node: str) -> bool:
    """Whether a node is ready; True if nothing is known about it."""
    for each in found.nodes:
        if each["metadata"]["name"] == node:
            ready = [c for c in each.get("status", {}).get("conditions", []) if c["type"] == "Ready"]
            return bool(ready) and ready[0]["status"] == "True"
    return True


def _listed(pods: list[Object]) -> str:
    first = pods[0]["metadata"]["name"]
    return first if len(pods) == 1 else f"{first} and {len(pods) - 1} more"


def _age(event: Object, now: datetime) -> str:
    return f"{max(0.0, (now - datetime.fromisoformat(state.event_time(event))).total_seconds()):.0f} s"
