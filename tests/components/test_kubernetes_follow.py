"""The end of a job that the API server tells of before it tells of the job's pods; all else is tried on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from components.launch import LaunchError, kubernetes_watch
from components.launch.kubernetes_follow import Follower
from components.launch.kubernetes_watch import Change
from manifests.kinds import PYTORCHJOB
from manifests.names import TASK_LABEL
from manifests.spec import ClusterSpec

Object = dict[str, Any]
LABELS = {TASK_LABEL: "train", PYTORCHJOB.job_label: "run", PYTORCHJOB.index_label: "0"}


def job() -> Object:
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "run", "uid": "1", "creationTimestamp": "2026-01-01T12:00:00Z", "labels": LABELS},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 1}}},
        "status": {"conditions": [{"type": "Succeeded", "status": "True", "message": ""}]},
    }


def ended_pod() -> Object:
    state = {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T12:00:01Z"}}
    return {
        "metadata": {"name": "run-worker-0", "uid": "pod", "labels": LABELS},
        "spec": {"nodeName": "node", "containers": [{"name": "pytorch"}]},
        "status": {"phase": "Succeeded", "containerStatuses": [{"name": "pytorch", "state": state}]},
    }


class OneLine:
    """In place of the client's: the log of a pod."""

    def stream(self, *arguments: Any, **options: Any) -> Iterator[str]:
        return iter(["2026-01-01T12:00:01Z worked"])


class Told:
    """A cluster whose watches tell nothing but what a test puts into the queue."""

    namespace, server = "team", "https://api"
    custom = SimpleNamespace(list_namespaced_custom_object=list)

    def __init__(self, *pods: Object) -> None:
        self.found = list(pods)
        read = SimpleNamespace(metadata=SimpleNamespace(uid="pod"))
        self.core = SimpleNamespace(
            list_namespaced_pod=list,
            list_namespaced_event=list,
            read_namespaced_pod=lambda *_: read,
            read_namespaced_pod_log=list,
        )

    def pods(self, *_: Any) -> list[Object]:
        if not self.found:
            raise LaunchError("the API server cannot be reached")
        return self.found


def followed(cluster: Told, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written of a job that succeeds at once."""
    monkeypatch.setattr(kubernetes_watch, "Watch", OneLine)
    lines: list[str] = []
    follower = Follower(cluster, job(), ClusterSpec(), lines.append)  # type: ignore[arg-type]
    follower.watchers = []
    follower.changes.put(Change("pytorchjobs", "MODIFIED", [job()]))
    follower.follow()
    return lines


def test_the_log_of_a_job_that_ends_before_its_pods_are_told_of_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(followed(Told(ended_pod()), monkeypatch)) == ["launcher: job run succeeded (0 restarts)", "worked"]


def test_a_job_that_has_succeeded_has_though_nothing_more_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(Told(), monkeypatch) == ["launcher: job run succeeded (0 restarts)"]
