"""What is read of Kueue: which version is asked, and what is left out where reading is forbidden or impossible."""

from __future__ import annotations

import copy
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from waiting import wait_until

from components.cluster import api, kueue
from components.cluster.api import Cluster
from components.cluster.kueue import InQueue, Position
from components.diagnose.causes import Obstacle
from components.launch import waiting as launch_waiting
from components.launch.waiting import QueueWatcher

Object = dict[str, Any]
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "kueue.json").read_text())
WAITING, WORKLOAD = RECORDED["waiting"]["job"], RECORDED["waiting"]["workload"]
GROUP, VISIBILITY = "/apis/kueue.x-k8s.io", "/apis/visibility.kueue.x-k8s.io"
FORBIDDEN = 403


class Server(ThreadingHTTPServer):
    """`answers` by path; a number is an HTTP status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Object | int] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def serves(self, *versions: str) -> None:
        """Kueue's API in these versions, with the recorded Workload and two others that wait."""
        self.answers[GROUP] = {"versions": [{"version": version} for version in versions]}
        for version in versions:
            self.answers[f"{GROUP}/{version}/namespaces/ns/workloads"] = {"items": [WORKLOAD]}
            place = f"{VISIBILITY}/{version}/namespaces/ns/localqueues/team/pendingworkloads"
            self.answers[place] = {"items": [pending("other", 0, 3), pending(WAITING["metadata"]["uid"], 1, 5)]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        found = self.server.answers.get(self.path.partition("?")[0], 404)
        message = 'User "me" cannot list' if found == FORBIDDEN else "not found"
        body = json.dumps({"message": message} if isinstance(found, int) else found).encode()
        self.send_response(found if isinstance(found, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def pending(uid: str, place: int, in_cluster_queue: int) -> Object:
    """As recorded of Kueue 0.17."""
    metadata = {"name": "w", "namespace": "ns", "ownerReferences": [{"name": "j", "uid": uid}]}
    return {"metadata": metadata, "positionInLocalQueue": place, "positionInClusterQueue": in_cluster_queue}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.shutdown()


@pytest.fixture
def cluster(server: Server, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(api, "PAUSES_SECONDS", ())
    settings = client.Configuration()
    settings.host, settings.retries = f"http://127.0.0.1:{server.server_port}", 0
    return Cluster(client.ApiClient(settings), "ns")


@pytest.mark.parametrize(("served", "asked"), [(("v1beta1", "v1beta2"), "v1beta2"), (("v1beta1",), "v1beta1")])
def test_the_newest_version_that_both_know_is_asked(
    server: Server, cluster: Cluster, served: tuple[str, ...], asked: str
) -> None:
    server.serves(*served)
    found = kueue.look(cluster, WAITING)
    assert found is not None and found.workload is not None
    assert found.workload["metadata"] == WORKLOAD["metadata"] and found.position == Position(2, 2, 6)
    uid = WAITING["metadata"]["uid"]
    selected = f"{GROUP}/{asked}/namespaces/ns/workloads?labelSelector=kueue.x-k8s.io%2Fjob-uid%3D{uid}"
    assert selected in server.asked


def test_an_unknown_version_is_one_line_with_the_fix(server: Server, cluster: Cluster) -> None:
    server.serves("v2")
    found = kueue.look(cluster, WAITING)
    assert found == InQueue(
        unread="this cluster's Kueue serves kueue.x-k8s.io only as v2, but this yaongi knows v1beta2 and v1beta1; "
        "update yaongi, or look with: kubectl describe workloads"
    )


def test_what_may_not_be_read_is_left_out(server: Server, cluster: Cluster) -> None:
    server.serves("v1beta2")
    server.answers[f"{VISIBILITY}/v1beta2/namespaces/ns/localqueues/team/pendingworkloads"] = FORBIDDEN
    found = kueue.look(cluster, WAITING)
    assert found is not None and found.workload is not None and found.position is None
    server.answers[f"{GROUP}/v1beta2/namespaces/ns/workloads"] = FORBIDDEN
    found = kueue.look(cluster, WAITING)
    assert found is not None and found.workload is None
    assert found.unread.startswith("no permission to list workloads in namespace 'ns' as me; grant it with: ")


def test_without_kueue_or_a_queue_nothing_is_asked_further(server: Server, cluster: Cluster) -> None:
    assert kueue.look(cluster, WAITING) == InQueue(unread="the cluster has no Kueue")
    asked = len(server.asked)
    plain = copy.deepcopy(WAITING)
    del plain["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert kueue.look(cluster, plain) is None and len(server.asked) == asked


def test_a_priority_class_is_looked_for_where_there_is_no_workload(server: Server, cluster: Cluster) -> None:
    server.serves("v1beta2")
    server.answers[f"{GROUP}/v1beta2/namespaces/ns/workloads"] = {"items": []}
    named = RECORDED["no-class"]["job"]
    assert kueue.look(cluster, named) == InQueue(absent_class="nosuch")
    path = f"{GROUP}/v1beta2/workloadpriorityclasses/nosuch"
    for answer in ({"value": 1}, FORBIDDEN):
        server.answers[path] = answer
        assert kueue.look(cluster, named) == InQueue()


def test_the_preemptor_is_named_if_it_is_of_the_namespace(server: Server, cluster: Cluster) -> None:
    server.serves("v1beta2")
    preempted, urgent = RECORDED["preempted"], RECORDED["urgent"]["job"]
    server.answers[f"{GROUP}/v1beta2/namespaces/ns/workloads"] = {"items": [preempted["workload"]]}
    found, unknown = (kueue.look(cluster, preempted["job"], others) for others in ([WAITING, urgent], [WAITING]))
    assert found is not None and found.preemptor == "urgent"
    assert unknown is not None and unknown.preemptor == ""


def test_a_launcher_is_told_what_changes_and_a_hopeless_cause_when_it_is_seen_twice(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_waiting, "LOOK_SECONDS", 0.02)
    server.serves("v1beta2")
    changes: queue.Queue[Obstacle] = queue.Queue()
    watcher = QueueWatcher(cluster, WAITING, changes)
    watcher.start()
    first = changes.get(timeout=10)
    assert first.text.startswith(
        "it waits at place 2 of 2 (place 6 of its ClusterQueue) in queue 'team': it needs 100m"
    )
    count = len(server.asked)
    wait_until(lambda: len(server.asked) > count + 9)
    assert changes.empty(), "nothing has changed"
    server.answers[f"{GROUP}/v1beta2/namespaces/ns/workloads"] = {"items": [RECORDED["never"]["workload"]]}
    assert [changes.get(timeout=10).hopeless for _ in range(2)] == [False, True]
    watcher.job = {**WAITING, "spec": {"suspend": False}}
    wait_until(lambda: (before := len(server.asked), threading.Event().wait(0.1), len(server.asked) == before)[-1])
    watcher.stop()
    watcher.join(10)
    assert not watcher.is_alive()
