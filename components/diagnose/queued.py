"""Why a job waits in a queue of Kueue, in plain words with the fix. Pure functions over the API's objects.

The conditions and messages are those of Kueue 0.17; one that matches nothing is shown as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from components.cluster import state
from components.cluster.kueue import InQueue, Position
from components.diagnose.causes import Obstacle
from manifests.kinds import QUEUE_LABEL, TRAINJOB, Object, kind_of
from manifests.queue import PRIORITY_LABEL

PATIENCE_SECONDS = 15  # how long Kueue or an operator may take before its silence is a symptom
NEVER_STARTS_SECONDS = 120  # an admitted job that is still suspended then will stay so

UNUSED = re.compile(r"insufficient unused quota for (\S+) in flavor (\S+), (\S+) more needed")
NEVER = re.compile(
    r"insufficient quota for (\S+) in flavor (\S+), previously considered podsets requests \(([^)]*)\) "
    r"\+ current podset request \(([^)]*)\) > maximum capacity \(([^)]*)\)"
)
ABSENT = re.compile(r"resource (\S+) unavailable in ClusterQueue")
PREEMPTING = re.compile(r"Pending the preemption of (\d+) workload")
FIELDS = {"cpu": "cluster.cpus_per_node", "memory": "cluster.memory_gib_per_node"}
# Who took the place, by the reason of the condition Preempted.
TAKEN_BY = {
    "InClusterQueue": "a job of higher priority",
    "InCohortReclamation": "a queue that took back the quota it had lent",
    "InCohortReclaimWhileBorrowing": "a queue that took back the quota it had lent",
    "InCohortFairSharing": "a queue that has had less than its share",
}
EVICTED = {
    "ClusterQueueStopped": "stopped with its ClusterQueue",
    "LocalQueueStopped": "stopped with its queue",
    "PodsReadyTimeout": "its pods were not ready in the time that Kueue gives them (waitForPodsReady)",
}
ASK_OWNER = "its administrator can start it again"


@dataclass(frozen=True)
class _Plain:
    """What a message means; `text` and `fix` may use the groups of `pattern`."""

    pattern: str
    text: str
    fix: str
    hopeless: bool = False


MESSAGES = (
    _Plain(
        r"LocalQueue (\S+) doesn't exist",
        r"the namespace has no LocalQueue '\1'",
        "kubectl get localqueues shows those it has: name one in cluster.queue, or have this one created",
        hopeless=True,
    ),
    _Plain(
        r"ClusterQueue (\S+) doesn't exist",
        r"there is no ClusterQueue '\1', to which the queue belongs",
        "have it created, or name another queue in cluster.queue",
    ),
    _Plain(
        r"ClusterQueue (\S+) is inactive",
        r"ClusterQueue '\1' is stopped or not ready",
        rf"kubectl describe clusterqueue \1 says why; {ASK_OWNER}",
    ),
    _Plain(
        r"LocalQueue (\S+) is inactive",
        r"the queue '\1' is stopped or not ready",
        rf"kubectl describe localqueue \1 says why; {ASK_OWNER}",
    ),
    _Plain(
        r"untolerated taint \{(\S*) (\S*) (\S+) [^}]*\} in flavor (\S+)",
        r"the nodes of flavor \4 have the taint \1=\2:\3",
        "if they are meant for the job, tolerate it (cluster.tolerations), or name another queue",
    ),
    _Plain(
        r"flavor (\S+) doesn't match node affinity",
        r"cluster.node_selector fits no nodes of the queue (flavor \1)",
        "change cluster.node_selector, or name another queue",
    ),
    _Plain(
        r"topology \"(\S+)\" allows to fit only (\d+) out of (\d+)",
        r"only \2 of \3 pods fit into one domain of topology \1 now",
        "wait until it has more room, ask for fewer (cluster.nodes), or write cluster.topology.preferred instead",
    ),
    _Plain(
        r"Flavor \"(\S+)\" does not contain the requested level",
        r"the topology of the queue's nodes (flavor \1) has no such level",
        "name one of its levels in cluster.topology (kubectl get topologies -o yaml)",
        hopeless=True,
    ),
    _Plain(
        r"Flavor \"(\S+)\" does not support TopologyAwareScheduling",
        r"the queue's nodes (flavor \1) have no topology",
        "remove cluster.topology, or name a queue whose nodes have one",
        hopeless=True,
    ),
    _Plain(r"^Preempted to accommodate", "there is no room for it now", "wait until jobs before it have ended"),
)


def queued(job: Object, found: InQueue, namespace: str, now: datetime | None = None, *, ages: bool = True) -> Obstacle:
    """What holds a suspended job back that is in a queue.

    Args:
        ages: say how long ago; False for a text that changes only with the cause.
    """
    now = now or datetime.now(UTC)

    def ago(condition: Object) -> str:
        return f" {_seconds(condition, now):.0f} s ago" if ages else ""

    name = job["metadata"]["labels"][QUEUE_LABEL]
    workload = found.workload
    if workload is None:
        return _without_workload(job, found, name, ages)
    if not workload["spec"].get("active", True):
        return _deactivated(workload, name, namespace)
    evicted = _true(workload, "Evicted")
    if (admitted := _true(workload, "Admitted")) and not evicted:
        return _admitted(job, _seconds(admitted, now), ago(admitted))
    place = f"it waits{_place(found.position)} in queue '{name}'"
    if evicted:
        place += f", {_history(workload, evicted, found.preemptor, ago(evicted))}"
    reserved = _condition(workload, "QuotaReserved")
    if reserved is None:
        return Obstacle(f"{place}: Kueue has not looked at it yet")
    reason = state.one_line(reserved.get("message", ""))
    if reserved["status"] == "True" and evicted:
        return Obstacle(f"{place}: its workers save and end")
    if reserved["status"] == "True":
        return Obstacle(
            f"{place}: its quota is reserved, other checks of the queue are not done yet{_checks(workload)}"
        )
    plain = explained(reason)
    return Obstacle(f"{place}: {plain.text}", plain.fix, plain.hopeless)


def explained(message: str) -> Obstacle:
    """A message of the condition QuotaReserved. It may be about several pod sets, which must all fit."""
    if match := PREEMPTING.search(message):
        return Obstacle(f"its place is being made: lower priorities end first ({match[1]})", "it starts when they have")
    texts, fixes, hopeless = [], [], False
    for part in message.split("; "):
        text, fix, never = _shortage(part)
        if text:
            texts.append(text)
            fixes.append(fix)
            hopeless |= never
    if texts:
        return Obstacle("; ".join(dict.fromkeys(texts)), fixes[0], hopeless)
    known = [(rule, match) for rule in MESSAGES if (match := re.search(rule.pattern, message))]
    if not known:
        return Obstacle(message or "Kueue gives no reason")
    return Obstacle(
        "; ".join(match.expand(rule.text) for rule, match in known),
        "; or ".join(match.expand(rule.fix) for rule, match in known),
        all(rule.hopeless for rule, _ in known),  # of several flavors one is enough
    )


def _shortage(part: str) -> tuple[str, str, bool]:
    """What one pod set lacks: text, fix, and whether it can never fit; "" for another message.

    A pod set takes any of the queue's flavors: it can never fit if each of them is too small.
    """
    short, never, absent = UNUSED.findall(part), NEVER.findall(part), ABSENT.findall(part)
    too_small = {flavor for _, flavor, *_ in never}
    usable = [(resource, flavor, more) for resource, flavor, more in short if flavor not in too_small]
    if usable and not absent:
        by_flavor: dict[str, list[str]] = {}
        for resource, flavor, more in usable:
            by_flavor.setdefault(flavor, []).append(f"{more} more {resource}")
        text = " or ".join(f"{' and '.join(all_)} than is free in flavor {name}" for name, all_ in by_flavor.items())
        less = _less(resource for resource, *_ in usable)
        return (
            f"it needs {text}",
            f"wait for jobs before it to end, ask for less ({less}), or have the quota raised",
            False,
        )
    if absent:
        text = f"its ClusterQueue has no quota for {' and '.join(dict.fromkeys(absent))}"
        return text, "name a queue that has it in cluster.queue, or have it added to this one's quota", True
    if never:
        texts = []
        for resource, flavor, before, now, most in never:
            beside = f", beside {before} of its other pods" if before != "0" else ""
            texts.append(
                f"{now} of {resource}{beside}, of which the queue never has more than {most} (flavor {flavor})"
            )
        less = _less(resource for resource, *_ in never)
        return (
            f"it will never fit: it needs {' or '.join(texts)}",
            f"ask for less ({less}), name a larger queue in cluster.queue, or have the quota raised",
            True,
        )
    return "", "", False


def _less(resources: Iterable[str]) -> str:
    fields = [FIELDS.get(each) or ("cluster.gpus_per_node" if "gpu" in each else "") for each in resources]
    return ", ".join(dict.fromkeys(["cluster.nodes", *(field for field in fields if field)]))


def _without_workload(job: Object, found: InQueue, name: str, ages: bool) -> Obstacle:
    kind, labels = job["kind"], job["metadata"]["labels"]
    if found.unread:
        return Obstacle(f"it waits in queue '{name}', but why cannot be read: {found.unread}")
    if found.absent_class:
        return Obstacle(
            f"it cannot enter queue '{name}': there is no WorkloadPriorityClass '{found.absent_class}'",
            "kubectl get workloadpriorityclasses shows those there are: name one in cluster.queue_priority, or have "
            "this one created",
            hopeless=True,
        )
    if (age := state.age_seconds(job)) < PATIENCE_SECONDS:
        since = f" {age:.0f} s ago" if ages else ""
        return Obstacle(f"it was created{since} and Kueue has not taken it up yet")
    wanted = labels.get(PRIORITY_LABEL)
    classes = f"that the WorkloadPriorityClass '{wanted}' exists, " if wanted else ""
    return Obstacle(
        f"it waits in queue '{name}', but Kueue has no workload for it",
        f"check {classes}that Kueue runs and handles {kind}s in this namespace, or remove the label {QUEUE_LABEL}",
    )


def _deactivated(workload: Object, name: str, namespace: str) -> Obstacle:
    evicted = _true(workload, "Evicted") or {}
    said = state.one_line(evicted.get("message", ""))
    why = "" if said in ("", "The workload is deactivated") else f": {said}"
    patch = """--type merge -p '{"spec":{"active":true}}'"""
    return Obstacle(
        f"its Workload in queue '{name}' is deactivated{why}",
        f"yaongi resume, or kubectl patch workload {workload['metadata']['name']} -n {namespace} {patch}",
    )


def _admitted(job: Object, seconds: float, ago: str) -> Obstacle:
    if seconds < PATIENCE_SECONDS:
        return Obstacle("its queue has admitted it; it starts now")
    if kind_of(job) is TRAINJOB:
        return Obstacle(
            f"its queue admitted it{ago}, but it is still suspended, as TrainJobs stay under Kubeflow "
            "Trainer 2.1, which does not know what Kueue 0.17 writes into them; it holds its quota meanwhile",
            "use Kubeflow Trainer 2.2 or newer, write cluster.job=pytorchjob, or leave cluster.queue out",
            hopeless=seconds > NEVER_STARTS_SECONDS,
        )
    return Obstacle(
        f"its queue admitted it{ago}, but it is still suspended",
        "check that Kueue runs: kubectl get pods -n kueue-system",
    )


def _place(position: Position | None) -> str:
    if position is None:
        return ""
    shared = f" (place {position.in_cluster_queue} of its ClusterQueue)"
    return f" at place {position.place} of {position.waiting}" + (
        shared if position.in_cluster_queue != position.place else ""
    )


def _history(workload: Object, evicted: Object, preemptor: str, ago: str) -> str:
    """How it lost its place."""
    if evicted["reason"] == "Preempted":
        by = TAKEN_BY.get((_true(workload, "Preempted") or {}).get("reason", ""), "another job")
        named = f" ({preemptor})" if preemptor else ""
        return f"preempted{ago} by {by}{named}, and goes on from its last checkpoint when it fits"
    return f"{EVICTED.get(evicted['reason']) or state.one_line(evicted.get('message', ''))}{ago}"


def _checks(workload: Object) -> str:
    """Admission checks that are not ready, such as one that starts new nodes first."""
    waiting = [
        f"{each['name']}: {state.one_line(each.get('message', '')) or each['state']}"
        for each in workload.get("status", {}).get("admissionChecks", [])
        if each.get("state") != "Ready"
    ]
    return f" ({'; '.join(waiting)})" if waiting else ""


def _seconds(condition: Object, now: datetime) -> float:
    return max(0.0, (now - datetime.fromisoformat(condition["lastTransitionTime"])).total_seconds())


def _condition(workload: Object, kind: str) -> Object | None:
    conditions = workload.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), None)


def _true(workload: Object, kind: str) -> Object | None:
    found = _condition(workload, kind)
    return found if found and found["status"] == "True" else None
