"""Why a job waits in its queue, from jobs and Workloads as Kueue 0.17 left them on a cluster."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components.cluster import kueue
from components.cluster.kueue import InQueue, Position
from components.diagnose.causes import CREATION, fix_for
from components.diagnose.queued import explained, queued
from components.diagnose.why import Situation, why

Object = dict[str, Any]
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "kueue.json").read_text())
NOW = datetime(2026, 11, 30, 21, 51, tzinfo=UTC)
AT = Position(2, 5, 2)

# Recorded case → what is said of it at place 2 of 5, and whether waiting is hopeless.
SAID = {
    "waiting": (
        "it waits at place 2 of 5 in queue 'team': it needs 100m more cpu than is free in flavor kq-node; wait for "
        "jobs before it to end, ask for less (cluster.nodes, cluster.cpus_per_node), or have the quota raised",
        False,
    ),
    "never": (
        "it waits at place 2 of 5 in queue 'team': it will never fit: it needs 400m of cpu, of which the queue never "
        "has more than 200m (flavor kq-node); ask for less (cluster.nodes, cluster.cpus_per_node), name a larger queue "
        "in cluster.queue, or have the quota raised",
        True,
    ),
    "no-resource": (
        "it waits at place 2 of 5 in queue 'team': its ClusterQueue has no quota for nvidia.com/gpu; name a queue that "
        "has it in cluster.queue, or have it added to this one's quota",
        True,
    ),
    "no-queue": (
        "it waits at place 2 of 5 in queue 'nope': the namespace has no LocalQueue 'nope'; kubectl get localqueues "
        "shows those it has: name one in cluster.queue, or have this one created",
        True,
    ),
    "preempted": (
        "it waits at place 2 of 5 in queue 'team', preempted 83 s ago by a job of higher priority, and goes on from "
        "its last checkpoint when it fits: it needs 100m more cpu than is free in flavor kq-node; wait for jobs before "
        "it to end, ask for less (cluster.nodes, cluster.cpus_per_node), or have the quota raised",
        False,
    ),
    "drained": (
        "it waits at place 2 of 5 in queue 'team', stopped with its ClusterQueue 31 s ago: ClusterQueue 'kq-lab' is "
        "stopped or not ready; kubectl describe clusterqueue kq-lab says why; its administrator can start it again",
        False,
    ),
    "stopped-queue": (
        "it waits at place 2 of 5 in queue 'team': ClusterQueue 'kq-lab' is stopped or not ready; kubectl describe "
        "clusterqueue kq-lab says why; its administrator can start it again",
        False,
    ),
    "stopped-localqueue": (
        "it waits at place 2 of 5 in queue 'team': the queue 'team' is stopped or not ready; kubectl describe "
        "localqueue team says why; its administrator can start it again",
        False,
    ),
    "deactivated": (
        "its Workload in queue 'team' is deactivated; yaongi resume, or kubectl patch workload pytorchjob-py1-4ca60 -n "
        """ns --type merge -p '{"spec":{"active":true}}'""",
        False,
    ),
    "no-level": (
        "it waits at place 2 of 5 in queue 'hosts': the topology of the queue's nodes (flavor kq-hosts) has no such "
        "level; name one of its levels in cluster.topology (kubectl get topologies -o yaml)",
        True,
    ),
    "no-topology": (
        "it waits at place 2 of 5 in queue 'team': the queue's nodes (flavor kq-node) have no topology; remove "
        "cluster.topology, or name a queue whose nodes have one",
        True,
    ),
    "apart": (
        "it waits at place 2 of 5 in queue 'hosts': only 1 of 2 pods fit into one domain of topology kq-hosts now; "
        "wait until it has more room, ask for fewer (cluster.nodes), or write cluster.topology.preferred instead",
        False,
    ),
}


def case(name: str) -> tuple[Object, Object | None]:
    found = copy.deepcopy(RECORDED[name])
    return found["job"], found["workload"]


@pytest.mark.parametrize("name", SAID)
def test_what_kueue_says_is_said_in_plain_words_with_the_fix(name: str) -> None:
    job, workload = case(name)
    held = queued(job, InQueue(workload, AT), "ns", NOW)
    assert (str(held), held.hopeless) == SAID[name]


def test_why_says_the_same_and_that_it_is_queued() -> None:
    job, workload = case("waiting")
    said = str(why(Situation("tr1", "ns", job, queue=InQueue(workload, AT)), NOW))
    assert said == f"queued: {SAID['waiting'][0]}"
    job, workload = case("deactivated")
    assert str(why(Situation("py1", "ns", job, queue=InQueue(workload)), NOW)).startswith("suspended: its Workload")


def test_the_place_is_said_as_far_as_it_is_known() -> None:
    job, workload = case("waiting")
    assert queued(job, InQueue(workload), "ns", NOW).text.startswith("it waits in queue 'team': it needs")
    shared = queued(job, InQueue(workload, Position(1, 3, 8)), "ns", NOW).text
    assert shared.startswith("it waits at place 1 of 3 (place 8 of its ClusterQueue) in queue 'team': ")


def test_who_took_the_place_is_named_and_a_launcher_is_not_told_the_seconds() -> None:
    job, workload = case("preempted")
    urgent, _ = case("urgent")
    assert kueue.preemptor_uid(workload or {}) == urgent["metadata"]["uid"]
    held = queued(job, InQueue(workload, preemptor="urgent"), "ns", NOW, ages=False)
    assert ", preempted by a job of higher priority (urgent), and goes on" in held.text
    assert held == queued(job, InQueue(workload, preemptor="urgent"), "ns", NOW + timedelta(hours=1), ages=False)
    assert kueue.preemptor_uid(case("resumed")[1] or {}) == "", "it has its place back"


def test_a_job_that_is_losing_its_place_is_not_taken_for_one_that_does_not_start() -> None:
    """For a moment the job is suspended while its Workload is both admitted and evicted."""
    job, workload = case("preempted")
    assert workload is not None
    for condition in workload["status"]["conditions"]:
        if condition["type"] in ("Admitted", "QuotaReserved"):
            condition["status"] = "True"
    held = queued(job, InQueue(workload), "ns", NOW + timedelta(hours=1), ages=False)
    assert held.text.endswith("and goes on from its last checkpoint when it fits: its workers save and end")
    assert not held.hopeless and not held.fix


def test_an_unknown_priority_class_leaves_no_workload() -> None:
    job, workload = case("no-class")
    assert workload is None
    held = queued(job, InQueue(absent_class="nosuch"), "ns", NOW)
    assert held.hopeless and "there is no WorkloadPriorityClass 'nosuch'; kubectl get workloadpri" in str(held)
    unreadable = str(queued(job, InQueue(), "ns", NOW))
    assert "but Kueue has no workload for it; check that the WorkloadPriorityClass 'nosuch' exists, " in unreadable
    fresh = job | {"metadata": job["metadata"] | {"creationTimestamp": datetime.now(UTC).isoformat()}, "status": {}}
    assert "Kueue has not taken it up yet" in queued(fresh, InQueue(), "ns", NOW).text


def test_a_trainjob_that_is_admitted_but_stays_suspended_names_trainer_2_1() -> None:
    """Seen with Trainer 2.1 and Kueue 0.17: Admitted=True, and nothing else happens."""
    job, _ = case("waiting")
    _, admitted = case("urgent")
    assert admitted is not None
    since = datetime.fromisoformat(admitted["status"]["conditions"][-1]["lastTransitionTime"])
    soon, later, late = (queued(job, InQueue(admitted), "ns", since + timedelta(seconds=s)) for s in (5, 60, 600))
    assert str(soon) == "its queue has admitted it; it starts now"
    assert "stay under Kubeflow Trainer 2.1" in later.text and "cluster.job=pytorchjob" in later.fix
    assert (later.hopeless, late.hopeless) == (False, True)
    other = queued(case("never")[0], InQueue(admitted), "ns", since + timedelta(seconds=600))
    assert "check that Kueue runs" in other.fix and not other.hopeless


UNUSED = "insufficient unused quota for nvidia.com/gpu in flavor {}, 8 more needed"
NEVER = (
    "insufficient quota for {} in flavor {}, previously considered podsets requests ({}) + current podset request "
    "(16) > maximum capacity (8)"
)
SET = "couldn't assign flavors to pod set {}: "


@pytest.mark.parametrize(
    ("message", "said", "hopeless"),
    [
        # Another flavor of the queue may have room later.
        (
            SET.format("a") + f"{UNUSED.format('a100')}, {NEVER.format('nvidia.com/gpu', 'h100', '0')}",
            "flavor a100",
            False,
        ),
        # The same flavor is too small for another resource.
        (
            SET.format("a") + f"{UNUSED.format('h100')}, {NEVER.format('cpu', 'h100', '0')}",
            "never fit: it needs 16 of",
            True,
        ),
        (
            SET.format("master")
            + f"{UNUSED.format('h100')}; "
            + SET.format("worker")
            + NEVER.format("memory", "h100", "4Gi"),
            "16 of memory, beside 4Gi of its other pods, of which the queue never has more than 8 (flavor h100)",
            True,
        ),
        (  # seen
            SET.format("worker") + "insufficient unused quota for cpu in flavor kq, 200m more needed, insufficient "
            "unused quota for memory in flavor kq, 64Mi more needed",
            "200m more cpu and 64Mi more memory than is free in flavor kq; wait for jobs before it to end, ask for "
            "less (cluster.nodes, cluster.cpus_per_node, cluster.memory_gib_per_node)",
            False,
        ),
        (SET.format("a") + UNUSED.format("h100"), "ask for less (cluster.nodes, cluster.gpus_per_node)", False),
        (SET.format("a") + f"{UNUSED.format('h100')}. Pending the preemption of 2 workload(s)", "end first (2)", False),
        (  # seen
            SET.format("worker")
            + "flavor pool doesn't match node affinity, untolerated taint {team other NoSchedule <nil>} in flavor gpu",
            "the nodes of flavor gpu have the taint team=other:NoSchedule; cluster.node_selector fits no nodes of the "
            "queue (flavor pool); if they are meant for the job, tolerate it (cluster.tolerations), or name",
            False,
        ),
        ("LocalQueue team is inactive", "kubectl describe localqueue team", False),
        ("ClusterQueue gone doesn't exist", "there is no ClusterQueue 'gone'", False),
        ("something new", "something new", False),
    ],
)
def test_several_flavors_pod_sets_and_messages(message: str, said: str, hopeless: bool) -> None:
    held = explained(message)
    assert said in str(held) and held.hopeless is hopeless, held


def test_kueue_that_is_down_is_named_although_its_webhook_has_another_name() -> None:
    message = (
        'Internal error occurred: failed calling webhook "mpod.kb.io": failed to call webhook: Post '
        '"https://kueue-webhook-service.kueue-system.svc:443/mutate--v1-pod?timeout=10s": dial tcp: connection refused'
    )
    fix, hopeless = fix_for(CREATION, message)
    assert fix.startswith("Kueue, which checks every pod and job of the cluster") and not hopeless
