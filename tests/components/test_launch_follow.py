"""Events of following a job that are too rare on a cluster: broken logs, expired credentials, ends out of order."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from kubernetes.client.exceptions import ApiException
from waiting import wait_until

from components.cluster import state, watch
from components.cluster.api import Cluster, Refused
from components.cluster.watch import Change, LogFollower, Watcher
from components.diagnose.causes import Obstacle
from components.launch import follow
from components.launch.follow import Follower
from manifests.clusterspec import ClusterSpec
from manifests.kinds import PYTORCHJOB, QUEUE_LABEL
from manifests.names import TASK_LABEL
from trainer.errors import LaunchError

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


class Log:
    """The answer to a request for a pod's log: `text`, in pieces of some bytes, then its end or an error."""

    def __init__(self, text: str, error: Exception | None = None) -> None:
        self.data, self.error = text.encode(), error

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield from (self.data[at : at + 7] for at in range(0, len(self.data), 7))
        if self.error:
            raise self.error

    def close(self) -> None: ...

    def release_conn(self) -> None: ...


class Told:
    """A cluster whose watches return only what a test puts into the queue."""

    namespace, server = "team", "https://api"
    custom = SimpleNamespace(list_namespaced_custom_object=list)

    def __init__(self, *pods: Object, logs: Sequence[Log | Exception] = ()) -> None:
        self.found, self.renewals = list(pods), 0
        self.logs, self.asked = list(logs), []  # answers to come, and the options of each request
        read = SimpleNamespace(metadata=SimpleNamespace(uid="pod"))
        self.core = SimpleNamespace(
            list_namespaced_pod=list,
            list_namespaced_event=list,
            read_namespaced_pod=lambda *_: read,
            read_namespaced_pod_log=self._log,
        )

    def _log(self, *_: Any, **options: Any) -> Log:
        self.asked.append(options)
        answer = self.logs.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def renew(self) -> None:
        self.renewals += 1

    def refusal(self, doing: str, error: ApiException) -> LaunchError:
        return LaunchError(f"{doing}: {error.status}")

    def get(self, *_: Any) -> Object | None:
        if not self.found:
            raise LaunchError("the API server cannot be reached")
        return {**job(), "status": {}}

    def pods(self, *_: Any) -> list[Object]:
        if not self.found:
            raise LaunchError("the API server cannot be reached")
        return self.found


def followed(cluster: Told) -> list[str]:
    """What is printed about a job that succeeds immediately."""
    lines: list[str] = []
    follower = Follower(cluster, job(), ClusterSpec(), lines.append)  # type: ignore[arg-type]
    follower.watchers = []
    follower.changes.put(Change("pytorchjobs", "MODIFIED", [job()]))
    follower.follow()
    return lines


def test_the_log_of_a_job_that_ends_before_its_pods_are_told_of_is_shown() -> None:
    cluster = Told(ended_pod(), logs=[Log("2026-01-01T12:00:01Z worked\n")])
    assert sorted(followed(cluster)) == ["launcher: job run succeeded (0 restarts)", "worked"]


def test_a_job_that_has_succeeded_has_though_nothing_more_can_be_asked() -> None:
    assert followed(Told()) == ["launcher: job run succeeded (0 restarts)"]


def log_of(monkeypatch: pytest.MonkeyPatch, *answers: Log | Exception) -> tuple[list[str], Told]:
    """Lines of one pod, which ends with the last answer."""
    monkeypatch.setattr(watch, "FIRST_PAUSE_SECONDS", 0.0)
    cluster, lines = Told(logs=answers), []
    follower = LogFollower(cluster, lines.append)  # type: ignore[arg-type]
    log = cluster.core.read_namespaced_pod_log

    def before_last_one_ends(*arguments: Any, **options: Any) -> Log:
        if len(cluster.logs) == 2:
            follower.ended("pod")
        return log(*arguments, **options)

    cluster.core.read_namespaced_pod_log = before_last_one_ends
    if len(answers) == 1:
        follower.ended("pod")
    follower.add(ended_pod())
    follower.start()
    wait_until(lambda: not cluster.logs)
    follower.finish(60)
    assert not follower.is_alive()
    return lines, cluster


BROKE = urllib3.exceptions.ProtocolError("connection broken")
T1, T2, T3 = (f"2026-01-01T12:00:0{second}.5Z" for second in (1, 2, 3))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        pytest.param([Log(f"{T1} a\n{T1} b\n{T1} b\n{T2} c\n")], "a b b c", id="one stamp for a buffer"),
        pytest.param(
            [Log(f"{T1} a\n{T1} b\n", BROKE), Log(f"{T1} a\n{T1} b\n{T1} b\n{T1} c\n{T2} d\n")],
            "a b b c d",
            id="a buffer across a reconnection",
        ),
        pytest.param(
            [Log(f"{T1} a\n{T3} c\n{T2} b\n", BROKE), Log(f"{T3} c\n{T2} b\n{T2} x\n")],
            "a c b x",
            id="stamps of two streams out of order",
        ),
        pytest.param([Log(f"{T1} a\n{T2} tor", BROKE), Log(f"{T1} a\n{T2} torn\n")], "a torn", id="a torn line"),
        pytest.param([Log(f"{T1} a\n{T2} no-newline")], "a no-newline", id="an end without a newline"),
        pytest.param([Log(f"{T1} a\n{T1} \n{T2} b\n")], "a  b", id="an empty line"),
        pytest.param(
            [Log(f"{T1} a\n", BROKE), Log(f"{T3} c\n", BROKE), Log(f"{T1} a\n{T2} b\n{T3} c\n")],
            "a b c",
            id="a window that does not reach back",
        ),
        pytest.param([Log(f"{T1} a\n", BROKE), Log(""), Log(f"{T2} b\n"), Log(f"{T2} b\n")], "a b", id="a rotated log"),
        pytest.param([Log(f"{T1} a\n", BROKE), BROKE, Log(f"{T1} a\n{T2} b\n")], "a b", id="an outage at the end"),
    ],
)
def test_every_line_of_a_log_is_printed_once(
    answers: list[Log | Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, cluster = log_of(monkeypatch, *answers)
    assert lines == expected.split(" ")
    assert "since_seconds" not in cluster.asked[0]
    assert all(asked["since_seconds"] >= 40 for asked in cluster.asked[1:2])


def test_more_lines_than_are_kept_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINES_KEPT", 3)
    written = "".join(f"{stamp} {n}\n" for n, stamp in enumerate([T1] * 5 + [T2] * 3))
    lines, _ = log_of(monkeypatch, Log(written, BROKE), Log(written + f"{T2} 8\n{T3} 9\n"))
    assert lines == [str(n) for n in range(10)]


def test_credentials_that_ran_out_are_read_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, cluster = log_of(monkeypatch, Log(f"{T1} a\n"), ApiException(401), Log(f"{T1} a\n{T2} b\n"))
    assert (lines, cluster.renewals) == (["a", "b"], 1)
    lines, cluster = log_of(monkeypatch, Log(f"{T1} a\n"), ApiException(401), ApiException(401))
    assert (lines, cluster.renewals) == (["a", "launcher: no log: get pods/log: 401"], 1)


def test_a_watcher_whose_credentials_are_refused_twice_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE_SECONDS", 0.0)
    listing = SimpleNamespace(data=json.dumps({"metadata": {"resourceVersion": "1"}, "items": []}))
    answers: list[Any] = [ApiException(401), listing, ApiException(401), ApiException(401)]

    def listed(**_: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cluster, changes = Told(), queue.Queue()
    watcher = Watcher(cluster, "pods", listed, changes)  # type: ignore[arg-type]
    watcher.start()
    watcher.join(60)
    assert not watcher.is_alive() and not answers
    assert changes.get().type == "LISTED"
    assert str(changes.get()) == "watch pods: 401"
    assert cluster.renewals == 2, "once for each time that they ran out"


def test_a_call_reads_the_credentials_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a server that accepts only the current credentials of the kubeconfig."""
    tokens: list[str] = []

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            good = tokens[-1] == "Bearer new"
            body = json.dumps({"items": []} if good else {"message": "Unauthorized"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "kubeconfig"

    def write(token: str) -> None:
        cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
        context = {"cluster": "c", "user": "u", "namespace": "team"}
        named = {
            "clusters": ("cluster", cluster),
            "users": ("user", {"token": token}),
            "contexts": ("context", context),
        }
        config = {key: [{"name": key[0], kind: value}] for key, (kind, value) in named.items()}
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", **config}))

    write("old")
    monkeypatch.setenv("KUBECONFIG", str(file))
    try:
        cluster = Cluster.connect()
        with pytest.raises(Refused) as refused:
            cluster.pods(PYTORCHJOB, "run")
        assert refused.value.status == 401
        assert len(tokens) == 2, "asked twice, not forever"
        write("new")
        assert cluster.pods(PYTORCHJOB, "run") == []
        assert tokens[2:] == ["Bearer old", "Bearer new"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("limit", ["queue_timeout_seconds", "start_timeout_seconds", "run_timeout_seconds"])
@pytest.mark.parametrize("answers", [True, False])
def test_time_limits_hold_while_a_watcher_fails(limit: str, answers: bool) -> None:
    phase = limit.split("_")[0].replace("queue", "queued").replace("start", "starting")
    pod = {**ended_pod(), "status": {"phase": "Running" if phase == "run" else "Pending"}}
    if phase == "queued":
        pod["spec"] = {"containers": pod["spec"]["containers"]}
    cluster, lines = Told(*([pod] if answers else [])), []
    follower = Follower(cluster, {**job(), "status": {}}, ClusterSpec(**{limit: 5}), lines.append)  # type: ignore[arg-type]
    follower.clock.phase = "running" if phase == "run" else phase  # type: ignore[assignment]
    follower.clock.since = time.monotonic()
    follower.running_since = time.monotonic() if phase == "run" else None
    follower.watchers = [SimpleNamespace(unreachable_since=time.monotonic())]  # type: ignore[list-item]
    assert not follower._check_clocks()
    follower.clock.since -= 10
    if follower.running_since:
        follower.running_since -= 10
    with pytest.raises(LaunchError, match=f"cluster.{limit}"):
        follower._check_clocks()


def test_what_a_last_look_finds_counts_before_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, lines = Told(ended_pod(), logs=[Log("")]), []
    follower = Follower(cluster, {**job(), "status": {}}, ClusterSpec(queue_timeout_seconds=5), lines.append)  # type: ignore[arg-type]
    follower.clock.since -= 10_000_000
    monkeypatch.setattr(cluster, "get", lambda *_: job())
    assert follower._check_clocks(), "it has succeeded meanwhile"


def in_queue(suspended: bool, **status: Any) -> Object:
    found = job()
    found["metadata"]["labels"] = LABELS | {QUEUE_LABEL: "team"}
    found["spec"]["runPolicy"] = {"suspend": suspended}
    found["status"] = {"conditions": [{"type": "Suspended", "status": str(suspended), **SINCE}], **status}
    return found


SINCE = {"lastTransitionTime": "2026-01-01T12:10:00Z"}


def test_the_time_that_a_preempted_job_waits_is_no_part_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lines: list[str] = []
    limits = ClusterSpec(queue_timeout_seconds=5000, start_timeout_seconds=50, run_timeout_seconds=100)
    follower = Follower(Told(), in_queue(False, startTime="2026-01-01T12:00:00Z"), limits, lines.append)  # type: ignore[arg-type]
    running = ended_pod()
    running["status"]["containerStatuses"][0]["state"] = {"running": {}}
    follower._see_pods(Change("pods", "LISTED", [running]))
    now[0] += 60
    follower._see_job(Change("pytorchjobs", "MODIFIED", [in_queue(True)]))
    follower._see_pods(Change("pods", "LISTED", []))
    now[0] += 4000
    assert follower._passed() == "", "it waits, longer than it may start or run"
    follower._see_job(Change("pytorchjobs", "MODIFIED", [in_queue(False)]))
    again = {**running, "metadata": {**running["metadata"], "uid": "second"}}
    follower._see_pods(Change("pods", "LISTED", [again]))
    now[0] += 30
    assert follower._passed() == "", "90 s of 100"
    now[0] += 20
    assert "ran longer than cluster.run_timeout_seconds = 100" in follower._passed()
    assert [line for line in lines if "suspended" in line or "admitted" in line] == [
        "launcher: job run was suspended; it goes on from its last checkpoint",
        "launcher: job run is admitted by queue 'team'",
    ]
    assert not [line for line in lines if "removed from outside" in line], lines


def test_a_job_found_suspended_has_waited_since_then_not_since_its_former_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "datetime", Then)
    assert state.age_seconds(in_queue(True, startTime="2026-01-01T12:00:00Z")) == 60
    assert state.age_seconds(in_queue(False, startTime="2026-01-01T12:10:30Z")) == 30


class Then(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Then:
        return cls(2026, 1, 1, 12, 11, tzinfo=tz)


def test_what_holds_a_queued_job_back_is_told_and_ends_a_launch_that_is_hopeless() -> None:
    lines: list[str] = []
    follower = Follower(Told(), in_queue(True), ClusterSpec(queue_timeout_seconds=1), lines.append)  # type: ignore[arg-type]
    follower.pods_known = True
    waits = Obstacle("it waits in queue 'team': it needs 1 more cpu", "wait")
    follower.changes.put(waits)
    with pytest.raises(LaunchError, match=r"waited \d+ s for nodes .*: it waits in queue 'team': it needs 1 more cpu"):
        follower._step()
    assert lines == [f"launcher: {waits}"]
    follower.changes.put(replace(waits, hopeless=True))
    with pytest.raises(LaunchError, match=r"^job run cannot start: it waits in queue"):
        follower._step()
    follower._see_job(Change("pytorchjobs", "MODIFIED", [in_queue(False)]))
    assert follower._why() != str(waits), "it has a place now"
