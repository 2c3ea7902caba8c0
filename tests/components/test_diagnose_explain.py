"""From pods and events, as the API server returns them, to what the launcher prints."""

from __future__ import annotations

from typing import Any

import pytest

from components.cluster import state
from components.diagnose import explain
from manifests.kinds import Object
from trainer import entrypoint


def pod(name: str = "run-worker-0", node: str | None = "gpu-1", state: Object | None = None, **status: Any) -> Object:
    statuses = [{"name": "sidecar", "state": {}}, {"name": "pytorch", "state": state}] if state else []
    spec: Object = {"containers": [{"name": "pytorch", "image": "registry/trainer:1"}]}
    if node:
        spec["nodeName"] = node
    return {"metadata": {"name": name}, "spec": spec, "status": {"containerStatuses": statuses, **status}}


def ended(code: int, at: str = "2026-01-01T00:00:00Z", **fields: str) -> Object:
    return {"terminated": {"exitCode": code, "finishedAt": at, **fields}}


def ends(*pods: Object) -> list[explain.Exit]:
    return [found for found in map(explain.exit_of, pods) if found is not None]


RUNNING: Object = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def test_phase_needs_every_worker() -> None:
    waiting: Object = {"waiting": {"reason": "ContainerCreating"}}
    assert state.phase_of([pod(state=RUNNING)], 2) == "queued", "a pod that is not created yet has no node either"
    assert state.phase_of([pod(state=RUNNING), pod(node=None)], 2) == "queued"
    assert state.phase_of([pod(state=RUNNING), pod(state=waiting)], 2) == "starting"
    assert state.phase_of([pod(state=RUNNING), pod(state=ended(0))], 2) == "running"


def test_the_final_exit_is_blamed_and_not_the_ones_it_caused() -> None:
    exits = ends(
        pod("run-worker-0", state=ended(160, "2026-01-01T00:00:01Z")),
        pod("run-worker-1", state=ended(70, "2026-01-01T00:00:03Z", message="loss is NaN at step 7\n")),
        pod("run-worker-2", state=ended(2, "2026-01-01T00:00:09Z")),
        pod("run-worker-3", state=ended(0, "2026-01-01T00:00:00Z")),
    )
    cause = explain.culprit(exits)
    assert cause is not None and cause.final
    assert cause.describe() == "run-worker-1 on node gpu-1 exited 70 (training diverged): loss is NaN at step 7"


def test_without_a_final_exit_the_first_failure_is_blamed() -> None:
    cause = explain.culprit(ends(pod("b", state=ended(143, "2026-01-02T00:00:00Z")), pod("a", state=ended(137))))
    assert cause is not None and cause.pod == "a" and not cause.final
    assert explain.culprit(ends(pod(state=ended(0)))) is None


def test_of_the_entrypoints_termination_message_only_the_reason_is_told(tmp_path, monkeypatch) -> None:
    written = tmp_path / "termination-log"
    written.touch()
    monkeypatch.setenv(entrypoint.TERMINATION_LOG_VARIABLE, str(written))
    entrypoint.write_termination_message(65, "rank 1: tokens are missing")
    (found,) = ends(pod(state=ended(65, message=written.read_text())))
    assert found.describe() == "run-worker-0 on node gpu-1 exited 65 (bad data): rank 1: tokens are missing"


def test_an_eviction_has_no_exit_code() -> None:
    evicted = pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
    (found,) = ends(evicted)
    assert found.describe() == "run-worker-0 on node gpu-1: Evicted: The node was low on resource: memory."
    assert not ends(pod(phase="Running", state=RUNNING))


def test_memory_is_named_with_the_remedy() -> None:
    (found,) = ends(pod(state=ended(137, reason="OOMKilled")))
    assert "out of memory; raise cluster.memory_gib_per_node" in found.describe()


@pytest.mark.parametrize(
    ("reason", "message", "hopeless"),
    [
        ("ErrImagePull", "manifest for registry/trainer:1 not found: manifest unknown", True),
        ("ImagePullBackOff", "pull access denied, repository does not exist", True),
        ("InvalidImageName", "couldn't parse image name", True),
        ("ImagePullBackOff", "dial tcp 10.0.0.1:443: connect: connection refused", False),
    ],
)
def test_an_image_is_waited_for_only_if_it_may_come(reason: str, message: str, hopeless: bool) -> None:
    found = explain.obstacle(pod(state={"waiting": {"reason": reason, "message": message}}))
    assert found is not None and found.pulling and found.hopeless is hopeless
    assert "registry/trainer:1" in found.text and message in found.text


def test_waiting_for_a_node_is_an_obstacle_but_creating_a_container_is_none() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}
    found = explain.obstacle(pod(node=None, conditions=[condition]))
    assert found == explain.Obstacle("cannot be scheduled: 0/3 nodes: no GPU", hopeless=False)
    assert explain.obstacle(pod(state={"waiting": {"reason": "ContainerCreating"}})) is None


@pytest.mark.parametrize(
    ("message", "hopeless"),
    [('pods "x" is forbidden: violates PodSecurity "restricted:latest"', True), ("exceeded quota: team", False)],
)
def test_a_quota_may_be_freed_but_a_rule_stays(message: str, hopeless: bool) -> None:
    found = explain.creation_obstacle({"reason": "FailedCreatePod", "message": f"Error creating: {message}"})
    assert found is not None and found.hopeless is hopeless and message in found.text
    assert explain.creation_obstacle({"reason": "SuccessfulCreatePod", "message": "Created pod: x"}) is None


JOB: Object = {
    "kind": "PyTorchJob",
    "metadata": {"name": "run", "uid": "1", "creationTimestamp": "2026-01-01T12:00:00Z"},
}


@pytest.mark.parametrize(
    ("about", "time", "expected"),
    [
        ({"kind": "Pod", "name": "run-worker-3"}, "2026-01-01T12:00:00Z", True),
        ({"kind": "Pod", "name": "run-worker-3"}, "2026-01-01T11:59:59Z", False),  # an earlier job of the same name
        ({"kind": "Pod", "name": "run-evaluate-worker-0"}, "2026-01-01T12:00:05Z", False),
        ({"kind": "PyTorchJob", "name": "run", "uid": "1"}, "2026-01-01T12:00:05Z", True),
        ({"kind": "PyTorchJob", "name": "run", "uid": "0"}, "2026-01-01T12:00:05Z", False),
        ({"kind": "Node", "name": "run-worker-3"}, "2026-01-01T12:00:05Z", False),
    ],
)
def test_events_of_others_are_not_told(about: Object, time: str, expected: bool) -> None:
    event = {"metadata": {"creationTimestamp": time}, "involvedObject": about, "lastTimestamp": time}
    assert state.is_about(event, JOB) is expected
    newer_api = {**event, "lastTimestamp": None, "eventTime": f"{time[:-1]}.123456Z"}
    assert state.is_about(newer_api, JOB) is expected


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"kind": "TrainJob", "name": "run", "uid": "1"}, True),
        ({"kind": "JobSet", "name": "run"}, True),
        ({"kind": "Job", "name": "run-node-0"}, True),
        ({"kind": "Job", "name": "run-evaluate-node-0"}, False),
        ({"kind": "Pod", "name": "run-node-0-1-x7k2p"}, True),
        ({"kind": "Pod", "name": "run-worker-1"}, False),
    ],
)
def test_events_of_what_stands_between_a_trainjob_and_its_pods_are_its_own(about: Object, expected: bool) -> None:
    event = {"metadata": {"creationTimestamp": "2026-01-01T12:00:01Z"}, "involvedObject": about}
    assert state.is_about(event, {**JOB, "kind": "TrainJob"}) is expected


def test_the_same_refusal_of_a_pod_made_again_has_the_same_words() -> None:
    def refused(suffix: str) -> explain.Obstacle | None:
        message = f'Error creating: pods "run-node-0-1-{suffix}" is forbidden: exceeded quota: team'
        return explain.creation_obstacle({"reason": "FailedCreate", "message": message})

    found = refused("x7k2p")
    assert found is not None and 'pods "run-node-0-1" is forbidden: exceeded quota: team' in found.text
    assert found == refused("zzzzz")


@pytest.mark.parametrize(
    ("job", "active", "running"),
    [
        ({"kind": "TrainJob", "status": {"jobsStatus": [{"name": "node", "ready": 2}]}}, True, True),
        ({"kind": "TrainJob", "status": {"jobsStatus": [{"name": "node", "ready": 0}]}}, True, False),
        ({"kind": "TrainJob", "status": {"conditions": [{"type": "Complete", "status": "True"}]}}, False, False),
        ({"kind": "PyTorchJob", "status": {"conditions": [{"type": "Running", "status": "True"}]}}, True, True),
        ({"kind": "PyTorchJob", "status": {"conditions": [{"type": "Succeeded", "status": "True"}]}}, False, False),
        ({"kind": "PyTorchJob", "status": {"conditions": [{"type": "Failed", "status": "True"}]}}, False, False),
    ],
)
def test_each_kind_has_its_own_words_for_how_a_job_stands(job: Object, active: bool, running: bool) -> None:
    assert (state.is_active(job), state.is_running(job)) == (active, running)


def test_long_messages_keep_their_end_on_one_line() -> None:
    text = "\n".join(f"line {number}" for number in range(1000))
    shown = state.one_line(text)
    assert shown.startswith("…") and shown.endswith("line 998 | line 999") and "\n" not in shown
    assert len(shown) <= state.LONGEST_MESSAGE_CHARACTERS + 1


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"operator": "Exists"}, True),
        ({"operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "team", "operator": "Exists"}, True),
        ({"key": "team", "value": "a"}, True),
        ({"key": "team", "value": "a", "effect": "NoSchedule"}, True),
        ({"key": "team", "operator": "Equal", "value": "b"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_a_taint_is_tolerated_by_key_value_and_effect_where_they_are_given(toleration: Object, tolerated: bool) -> None:
    taint = {"key": "team", "value": "a", "effect": "NoSchedule"}
    assert explain.tolerates(toleration, taint) is tolerated
