"""A launcher that is stopped also ends its job, even if it is stopped several times."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from components.cluster.api import ApiUnreachable
from components.launch import kubernetes
from manifests.render import job_objects
from manifests.spec import load_job


class Cluster:
    """A cluster with one job; before each answer it calls `send`, which a test sets."""

    namespace = "team"

    def __init__(self, unreachable: int = 0) -> None:
        self.jobs: list[Any] = []
        self.unreachable = unreachable

    def delete(self, kind: str, name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        if self.unreachable:
            self.unreachable -= 1
            raise ApiUnreachable("no answer")
        self.jobs.clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """(cluster, signal) -> launch a job, and be told to stop by the signal while following it."""

    def launch(cluster: Cluster, first: int) -> list[str]:
        def create(_: object, job: Any, *__: object) -> Any:
            cluster.jobs.append(job)
            return job

        def follow() -> None:
            os.kill(os.getpid(), first)

        def gone(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not cluster.jobs, "the job runs on"

        lines: list[str] = []
        monkeypatch.setattr(kubernetes, "_require_claims", lambda *_: None)
        monkeypatch.setattr(kubernetes, "_make_room", lambda *_: None)
        monkeypatch.setattr(kubernetes, "_create", create)
        monkeypatch.setattr(kubernetes, "_hand_over", lambda *_: None)
        monkeypatch.setattr(kubernetes, "_wait_until_gone", gone)
        monkeypatch.setattr(kubernetes, "Follower", lambda *_: SimpleNamespace(follow=follow))
        monkeypatch.setattr(kubernetes.time, "sleep", lambda _: None)
        monkeypatch.setattr(Cluster, "own_pod", lambda self: None, raising=False)
        job = load_job("tiny")
        kubernetes.launch(cluster, job_objects(job), job.cluster, lines.append, lambda: lines.append("left over"))
        return lines

    return launch


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("unreachable", [0, 2, 3])
def test_further_signals_do_not_cut_the_stop_short(launched, first: int, unreachable: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cluster = Cluster(unreachable)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as error:
        launched(cluster, first)
    assert bool(cluster.jobs) == (unreachable == 3)
    if first == signal.SIGTERM:
        assert error.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
