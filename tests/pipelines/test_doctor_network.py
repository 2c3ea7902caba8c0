"""`yaongi doctor --network` without a cluster: the program of its pods on this machine, and what its answers mean."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ports import free_port

from components.cluster import netprobe
from components.cluster.netprobe import OPEN, SAID
from components.plan import admissible
from manifests.spec import load_job
from pipelines.doctor import network
from pipelines.doctor.network import Came, judged
from trainer.errors import LaunchError

PROGRAM = [sys.executable, "-c", Path(netprobe.__file__).read_text(encoding="utf-8")]
LATE = "timed out"
ALL = {"rank": OPEN, "dns": OPEN, "api": LATE, "web": LATE}  # of a worker where everything works
STRANGER = {"rank": LATE, "metrics": OPEN, "api": OPEN, "web": OPEN}
KEYS = ("rank to rank", "DNS", "metrics", "enforcement", "worker to the API server", "worker to huggingface.co:443")


def states(peer: dict, stranger: dict, *, is_installed: bool = True) -> dict[str, str]:
    found = list(judged(Came(ALL | peer, STRANGER | stranger, is_installed)))
    assert tuple(finding.what for finding in found) == KEYS
    assert all(finding.remedy for finding in found if finding.state == "no")
    return {finding.what: finding.state for finding in found if finding.state != "ok"}


@pytest.mark.parametrize(
    ("peer", "stranger", "is_installed", "expected"),
    [
        ({}, {}, True, {}),
        ({"api": OPEN, "web": OPEN}, {"rank": OPEN}, True, dict.fromkeys(KEYS[3:], "missing")),
        ({"api": OPEN, "web": OPEN}, {}, False, dict.fromkeys(KEYS[4:], "missing")),
        ({"api": OPEN}, {}, True, {KEYS[4]: "no"}),
        ({}, {"web": "Name or service not known"}, True, {KEYS[5]: "unknown"}),
        ({"rank": LATE}, {}, True, {KEYS[0]: "no", KEYS[3]: "unknown"}),
        ({"dns": "Temporary failure in name resolution"}, {}, True, {KEYS[1]: "no"}),
        ({}, {"metrics": LATE}, True, {KEYS[2]: "missing"}),
    ],
)
def test_what_the_pods_found_is_judged(peer: dict, stranger: dict, is_installed: bool, expected: dict) -> None:
    assert states(peer, stranger, is_installed=is_installed) == expected


def tried(**targets: tuple[str, int, bool]) -> dict[str, str]:
    done = subprocess.run([*PROGRAM, "try", json.dumps(targets)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(SAID), done.stderr
    return json.loads(done.stdout.removeprefix(SAID))


@pytest.fixture
def listening() -> Iterator[int]:
    port = free_port()
    with subprocess.Popen([*PROGRAM, "serve", "30", str(port)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
        yield port
        server.kill()


def test_the_pods_program_says_what_is_open(listening: int) -> None:
    closed = free_port()
    found = tried(there=("127.0.0.1", listening, True), shut=("127.0.0.1", closed, False), name=("localhost", 0, True))
    assert found == {"there": OPEN, "shut": "Connection refused", "name": OPEN}


def test_what_should_be_shut_may_become_so_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on networks that apply a policy some time after the pod has started; a lost packet alone is no policy."""
    answers = iter([OPEN, LATE, OPEN, LATE, LATE, OPEN])
    monkeypatch.setattr(netprobe, "attempt", lambda host, port: next(answers))
    monkeypatch.setattr(netprobe, "PAUSE_SECONDS", 0.0)
    assert netprobe.tried(("10.0.0.1", 1, False)) == LATE and next(answers) == OPEN


def test_missing_rights_are_one_line_and_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissible, "_allowed", lambda look, group, resource, verb: verb == "list")
    (finding,) = network.findings(SimpleNamespace(namespace="team"), "image")
    assert finding.state == "unknown"
    assert "create/delete jobs, create networkpolicies, create pods, get pods/log in namespace 'team'" in finding.detail


def test_a_pod_that_does_not_start_is_told_with_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PATIENCE_SECONDS", 0.01)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    status = {"phase": "Pending", "containerStatuses": [{"name": "probe", "state": waiting}]}
    pod = {
        "metadata": {"name": "p", "uid": "1"},
        "spec": {"containers": [{"name": "probe", "image": "a:1"}]},
        "status": status,
    }
    look = SimpleNamespace(namespace="team", items=lambda path: [pod])
    with pytest.raises(LaunchError, match=r"check \(registry/a:1; YAONGI_PIPELINE_IMAGE names another\): "):
        network._waited(look, load_job("tiny"), "peer", "Succeeded", "registry/a:1")


def test_whatever_happens_what_was_made_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []

    class Breaks:
        namespace = "team"

        def items(self, path: str) -> list:
            return []

        def post(self, path: str, body: dict) -> dict:
            if body["kind"] == "NetworkPolicy":
                assert body["metadata"]["ownerReferences"][0]["uid"] == "7"
                raise LaunchError("refused")
            return {"metadata": body["metadata"] | {"uid": "7"}}

        def delete(self, path: str) -> None:
            deleted.append(path)

    monkeypatch.setattr(admissible, "_allowed", lambda *of: True)
    with pytest.raises(LaunchError, match="refused"):
        list(network.findings(Breaks(), "image"))
    (path,) = deleted
    assert path.startswith("/apis/batch/v1/namespaces/team/jobs/doctor-")
