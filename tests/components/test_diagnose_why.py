"""What `yaongi why` answers in states that a test cluster cannot reach: lost nodes, webhooks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from components.diagnose.causes import CREATION, IMAGE, SCHEDULING, fix_for
from components.diagnose.explain import CREATION_FAILURES, creation_obstacle
from components.diagnose.why import Situation, why

Object = dict[str, Any]
NOW = datetime(2026, 1, 1, 13, 0, 0, tzinfo=UTC)


def job(*conditions: Object, replicas: int = 2, labels: Object | None = None, **policy: Any) -> Object:
    worker = {"replicas": replicas}
    return {
        "kind": "PyTorchJob",
        "metadata": {"name": "run", "uid": "1", "creationTimestamp": "2026-01-01T12:00:00Z", "labels": labels or {}},
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": {"Worker": worker}},
        "status": {"conditions": list(conditions), "startTime": "2026-01-01T12:00:00Z"} if conditions else {},
    }


def condition(kind: str, message: str = "", status: str = "True") -> Object:
    return {"type": kind, "status": status, "message": message}


def pod(index: int, node: str | None = "gpu-1", state: Object | None = None, **metadata: Any) -> Object:
    spec: Object = {"containers": [{"name": "pytorch", "image": "r/trainer:1"}]} | ({"nodeName": node} if node else {})
    status = {"containerStatuses": [{"name": "pytorch", "state": state, "restartCount": 0}]} if state else {}
    name = f"run-worker-{index}"
    return {"metadata": {"name": name, "uid": f"pod-{index}", **metadata}, "spec": spec, "status": status}


def event(reason: str, message: str, uid: str = "1", kind: str = "PyTorchJob", **more: Any) -> Object:
    about = {"kind": kind, "name": "run", "uid": uid}
    return {
        "reason": reason,
        "message": message,
        "involvedObject": about,
        "lastTimestamp": "2026-01-01T12:59:00Z",
    } | more


def answer(found: Object | None, *pods: Object, **more: Any) -> str:
    return str(why(Situation("run", "team", found, list(pods), **more), NOW))


def test_an_operator_that_does_not_run_is_told_only_after_a_while() -> None:
    assert "has not taken it up for" in answer(job())
    fresh = job()
    fresh["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat()
    assert "has not taken it up yet" in answer(fresh)


def test_what_hinders_all_workers_alike_is_said_once() -> None:
    full = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/4 nodes: 4 Insufficient cpu.",
    }
    pods = [pod(0, None), pod(1, None)]
    for each in pods:
        each["status"]["conditions"] = [full]
    said = answer(job(condition("Created")), *pods)
    assert said.startswith("queued: run-worker-0 and 1 more cannot be scheduled: 0/4 nodes: 4 Insufficient cpu.; wait")
    assert "short by" not in said


def test_a_node_that_was_lost_is_named_with_the_pod_that_hangs_on_it() -> None:
    late = (NOW - timedelta(minutes=5)).isoformat()
    lost = {"metadata": {"name": "gpu-1"}, "spec": {}, "status": {"conditions": [condition("Ready", status="Unknown")]}}
    said = answer(None, pod(1, deletionTimestamp=late), nodes=[lost])
    assert said.startswith("ending: run-worker-1 cannot end: stuck Terminating on node gpu-1, which does not answer;")
    ending = (NOW + timedelta(seconds=20)).isoformat()
    assert answer(None, pod(1, deletionTimestamp=ending)) == "ending: it was deleted and run-worker-1 still end"


def test_an_eviction_is_told() -> None:
    evicted = pod(0)
    evicted["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    said = answer(job(condition("Failed", "job is failing because Worker replica(s) failed")), evicted)
    assert said.startswith("failed: run-worker-0 on node gpu-1: Evicted: The node was low on resource: memory.")


def test_a_pull_that_takes_long_is_told_with_its_time() -> None:
    waiting = pod(0, state={"waiting": {"reason": "ContainerCreating"}})
    pulling = event("Pulling", 'Pulling image "r/trainer:1"', uid="pod-0", kind="Pod")
    said = answer(job(condition("Created"), replicas=1), waiting, events=[pulling])
    assert said == "starting: node gpu-1 pulls the image 'r/trainer:1', for 60 s"


def test_a_deadline_that_the_operator_has_not_noticed_is_told() -> None:
    running = pod(0, state={"running": {}})
    said = answer(job(condition("Running"), replicas=1, activeDeadlineSeconds=60), running)
    assert "its activeDeadlineSeconds passed" in said


@pytest.mark.parametrize(
    "early",
    [
        'Error creating: admission webhook "mpod.kb.io" denied the request: PyTorchJob.kubeflow.org "run" not found',
        'job "run-node-0" creation failed with error: admission webhook "mjob.kb.io" denied the request: '
        'JobSet.jobset.x-k8s.io "run" not found',
        'TrainJob resources reconciliation failed: admission webhook "mjobset.kb.io" denied the request: '
        'TrainJob.trainer.kubeflow.org "run" not found',
    ],
)
def test_what_belongs_to_a_job_that_kueue_does_not_know_yet_hinders_nobody(early: str) -> None:
    for reason in CREATION_FAILURES:
        assert creation_obstacle({"reason": reason, "message": early}) is None
        assert creation_obstacle({"reason": reason, "message": early.replace("not found", "is forbidden")})


def test_a_service_that_is_there_already_hinders_nobody() -> None:
    stale = event("FailedCreateService", 'Error creating: services "run-worker-0" already exists')
    assert "cannot be created" not in answer(job(condition("Created")), events=[stale])


@pytest.mark.parametrize(
    ("message", "fix", "hopeless"),
    [
        ('failed calling webhook "v.kueue.io": connection refused', "webhook v.kueue.io does not answer", False),
        ('admission webhook "gate" denied the request: no', "change the job as the policy wants", True),
        (  # seen with Kueue, for a job in no queue, when its pod came right after it
            'admission webhook "mpod.kb.io" denied the request: PyTorchJob.kubeflow.org "run" not found',
            "has not seen PyTorchJob.kubeflow.org run yet: the next attempt succeeds",
            False,
        ),
        ("failed quota: team: must specify limits.cpu", "quota team wants every container to state limits.cpu", True),
        ("maximum memory usage per Container is 1Gi", "kubectl describe limitrange", True),
        ("no PriorityClass with name high was found", "create the priority class high", True),
    ],
)
def test_refusals_of_a_pod_say_whether_waiting_helps(message: str, fix: str, hopeless: bool) -> None:
    found, waiting_is_hopeless = fix_for(CREATION, message)
    assert fix in found and waiting_is_hopeless is hopeless


def test_the_scheduler_names_several_reasons_and_both_remedies_are_given() -> None:
    message = "0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {gpu: yes}."
    found, _ = fix_for(SCHEDULING, message, several=True)
    assert found.startswith("wait for nvidia.com/gpu, add nodes") and "; or if these nodes are meant" in found
    assert fix_for(SCHEDULING, "0/1 nodes are available: 1 Insufficient example.com/x.")[0].startswith(
        "wait for example.com/x,"
    )


def test_a_private_registry_is_told_from_a_missing_tag() -> None:
    assert "imagePullSecret" in fix_for(IMAGE, "pull access denied, repository does not exist or may require auth")[0]
    assert "no such name or tag" in fix_for(IMAGE, "r/trainer:1: not found")[0]
