"""`yaongi status`, `stop` and `resume` on runs of a cluster, with a server that stores objects like an API server but
has no operator that creates pods for them."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import yaml

from components.cluster.api import RESOURCES, Cluster
from manifests.clusterspec import StorageSpec
from manifests.kinds import KINDS, Object, pod_template
from manifests.render import job_objects
from manifests.spec import JobSpec, job_from
from trainer.process.limits import UNWATCHED_VARIABLE


class ApiServer(ThreadingHTTPServer):
    """`objects` by path, `asked` are the requests; it knows one kind of job."""

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Object] = {}
        self.asked: list[tuple[str, str]] = []
        self.unknown = [each.plural for name, each in KINDS.items() if name != kind]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def has(self, path: str) -> list[Object]:
        """The objects in a collection."""
        return [found for place, found in self.objects.items() if place.rpartition("/")[0] == path]


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def answer(self, value: Object | None) -> None:
        body = json.dumps(value if value is not None else {"message": f'"{self.path}" not found'}).encode()
        self.send_response(200 if value is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        path, objects = urlparse(self.path).path, self.server.objects
        self.server.asked.append((self.command, path))
        is_collection = len(path.partition("/namespaces/")[2].split("/")) == 2
        if any(plural in path for plural in self.server.unknown):
            self.answer(None)
        elif self.command == "POST":
            made = {"uid": str(uuid.uuid4()), "creationTimestamp": datetime.now(UTC).isoformat()}
            body["metadata"] |= made
            objects[f"{path}/{body['metadata']['name']}"] = body
            self.answer(body)
        elif self.command == "GET" and is_collection:
            self.answer({"metadata": {}, "items": self.server.has(path)})
        elif self.command == "DELETE":
            self.answer({} if objects.pop(path, None) else None)
        else:
            self.answer(objects.get(path))

    do_GET = do_POST = do_PATCH = do_DELETE = handle_request

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """With the volume claims in namespace `team`, which is the one of the kubeconfig's context."""
    made = ApiServer(kind)
    for claim in (StorageSpec().datasets_pvc, StorageSpec().checkpoints_pvc):
        made.objects[f"/api/v1/namespaces/team/persistentvolumeclaims/{claim}"] = {"metadata": {"name": claim}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}
    there = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{made.server_port}"}}
    config = {"contexts": [context], "current-context": "c", "clusters": [there], "users": [{"name": "u", "user": {}}]}
    (tmp_path / "config").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    yield made
    made.shutdown()


def jobs_at(kind: str) -> str:
    group, version, plural = RESOURCES[KINDS[kind].kind]
    return f"/apis/{group}/{version}/namespaces/team/{plural}"


def launched(kind: str, name: str, **settings: Any) -> JobSpec:
    """A job created by a launcher."""
    job = job_from({"preset": "tiny", "name": name}, {"cluster": {"job": kind, **settings}})
    cluster = Cluster.connect("team")
    for item in job_objects(job):
        cluster.create(item)
    return job


def environment(job: Object, server: ApiServer, kind: str) -> list[str]:
    """Names of the variables of the workers that the cluster would make of a job."""
    runtimes = server.has(jobs_at(kind).replace(KINDS[kind].plural, "trainingruntimes"))
    (container,) = pod_template([*runtimes, job])["spec"]["containers"]
    return [variable["name"] for variable in container["env"]]


def test_the_status_of_all_runs_lists_the_jobs_once(server, kind, yaongi):
    names = [launched(kind, name).run_name for name in ("one", "two")]
    server.asked.clear()
    code, said, _ = yaongi("status", "--namespace", "team")
    assert code == 0 and all(f"{name} " in said for name in names)
    assert server.asked.count(("GET", jobs_at(kind))) == 1


def test_a_finished_run_shows_the_numbers_of_its_training_not_of_its_newest_job(server, kind, yaongi, monkeypatch):
    job = launched(kind, "mine")
    for item in job_objects(job, "export"):
        item["metadata"]["creationTimestamp"] = "2099-01-01T00:00:00Z"
        server.objects[f"{jobs_at(kind)}/{item['metadata']['name']}"] = item
    pod = {"metadata": {"name": "rank-0", "labels": {KINDS[kind].index_label: "0"}, "uid": "1"}}
    pod["spec"] = {"containers": [{"name": KINDS[kind].container}]}
    lines = ["2026-01-01T11:58:00Z step 40/40  loss 5.5000  grad 1.0  lr 1.00e-02  900 tokens/s  ETA 0:00:00"]
    lines.append("2026-01-01T11:58:01Z checkpoint of step 40 published after 0.5 s")
    monkeypatch.setattr(Cluster, "pods", lambda self, kind, name: [pod] if name == job.run_name else [])
    monkeypatch.setattr(Cluster, "log_tail", lambda self, *_, **__: lines)
    code, said, error = yaongi("status", "-n", "team")
    assert code == 0 and " 40/40 " in said and " 5.500 " in said and "step 40, " in said, error


def test_a_stopped_run_is_shown_until_it_is_resumed(server, kind, yaongi):
    name = launched(kind, "mine").run_name
    code, said, error = yaongi("stop", name, "-n", "team")
    assert code == 0 and f"continue: yaongi resume {name} -n team" in said, error
    assert not server.has(jobs_at(kind))

    again = f"continue: yaongi resume {name} -n team"
    for where in ([], ["-n", "team"]):
        code, said, _ = yaongi("status", *where)
        (row, told) = said.splitlines()[1:]
        assert row.split()[:4] == [name, "namespace", "team", "stopped"] and told == f"{name}: {again}"
        assert "none yet" not in row, "the checkpoint that stopping has saved is out of sight"
        assert f"state       stopped: {again}\n" in yaongi("status", "mine", *where)[1]
    assert f"{again} --workdir {Path.cwd()}/work\n" in yaongi("status", "mine", "--workdir", f"{Path.cwd()}/work")[1]
    assert yaongi("status", "-n", "other") == (0, "no runs in namespace other\n", "")
    code, _, error = yaongi("resume", name, "-n", "other")
    assert code == 2 and error.startswith(f"error: no run '{name}' in namespace 'other', nor stopped there from work")

    assert yaongi("resume", "mine")[:2] == (
        0,
        f"created job {name} in namespace team\njob {name} continues; follow it: yaongi logs {name} -n team --follow; "
        "how far: yaongi status -n team\n",
    )
    code, said, _ = yaongi("status")
    assert name in said and "stopped" not in said


def test_a_stopped_run_that_was_launched_again_is_shown_once(server, kind, yaongi):
    name = launched(kind, "mine").run_name
    assert yaongi("stop", name)[0] == 0
    (file,) = Path("work/stopped").iterdir()
    (file.parent / file.name.replace("team.", "other.")).write_bytes(file.read_bytes())
    file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")  # what macOS creates on other disks
    launched(kind, "mine")
    shown = yaongi("status", "-n", "team")[1]
    assert f"{name} " in shown and "stopped" not in shown
    assert [line.split()[2:4] for line in yaongi("status")[1].splitlines() if f"{name}  namespace" in line] == [
        ["team", "queued"],
        ["other", "stopped"],
    ]


def test_the_device_claims_of_a_stopped_run_are_made_again(server, kind, yaongi):
    job, place = launched(kind, "mine", devices={"nic.example.com": 2}), "/apis/resource.k8s.io/v1/namespaces/team"
    (made,) = server.has(f"{place}/resourceclaimtemplates")
    assert yaongi("stop", job.run_name)[0] == 0
    server.objects.pop(f"{place}/resourceclaimtemplates/{job.run_name}", None)  # as the garbage collector does
    assert yaongi("resume", job.run_name)[0] == 0
    (again,) = server.has(f"{place}/resourceclaimtemplates")
    assert again["spec"] == made["spec"] and again["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"] == 2


def test_a_run_that_is_resumed_is_not_bound_to_the_lease_of_its_former_launcher(server, kind, yaongi):
    job = launched(kind, "mine")
    (made,) = server.has(jobs_at(kind))
    assert UNWATCHED_VARIABLE not in environment(made, server, kind)
    for _ in range(2):  # what was resumed once may be stopped again
        assert yaongi("stop", job.run_name)[0] == 0
        assert yaongi("resume", job.run_name)[0] == 0
        (resumed,) = server.has(jobs_at(kind))
        assert environment(resumed, server, kind).count(UNWATCHED_VARIABLE) == 1
    assert resumed["metadata"]["annotations"] == made["metadata"]["annotations"], "a launcher takes it for its job"


def test_why_tells_of_a_job_by_its_name_or_beginning_and_of_one_that_is_gone_by_its_events(server, kind, yaongi):
    name = launched(kind, "mine").run_name
    for text in (name, "mine"):
        code, said, _ = yaongi("why", text, "-n", "team")
        assert code == 0 and said.startswith(f"{name} is queued: ")
    code, _, error = yaongi("why", "nothing")
    assert code == 2 and error == f"error: no run 'nothing' among the jobs of namespace 'team'; known: {name}\n"
    (made,) = server.has(jobs_at(kind))
    del server.objects[f"{jobs_at(kind)}/{name}"]
    about = {"kind": KINDS[kind].kind, "name": name, "uid": made["metadata"]["uid"]}
    told = {"metadata": made["metadata"], "involvedObject": about, "message": "was here"}
    server.objects["/api/v1/namespaces/team/events/one"] = told
    code, said, _ = yaongi("why", name)
    assert code == 0 and said.startswith(f"{name} is gone: ") and "was here" in said


def test_a_job_of_the_cluster_is_not_changed_when_it_is_resumed(server, kind, yaongi):
    name = launched(kind, "mine").run_name
    assert yaongi("stop", name)[0] == 0
    code, said, error = yaongi("resume", name, "-n", "team", "--set", "train.steps=9")
    assert (code, said) == (69, "") and error.startswith("error: --set: ")
    assert not server.has(jobs_at(kind))


def queued(server: ApiServer, kind: str, *, active: bool = True) -> Object:
    """A job that Kueue holds back, with its Workload."""
    name = launched(kind, "mine", queue="gpus").run_name
    (made,) = server.has(jobs_at(kind))
    (made["spec"] if kind == "trainjob" else made["spec"]["runPolicy"])["suspend"] = True
    server.objects["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v1beta2"}]}
    workload = {"metadata": {"name": name}, "spec": {"active": active, "podSets": []}, "status": {}}
    server.objects[f"/apis/kueue.x-k8s.io/v1beta2/namespaces/team/workloads/{name}"] = workload
    return made


def test_a_run_that_waits_in_a_queue_is_stopped_and_waits_again_when_it_is_resumed(server, kind, yaongi):
    job = queued(server, kind)
    name = job["metadata"]["name"]
    code, _, error = yaongi("resume", name)
    assert code == 69 and error == (
        f"error: run {name} waits in queue 'gpus' and starts by itself when there is room; what it waits for: yaongi "
        f"why {name} -n team\n"
    )
    code, said, error = yaongi("stop", name)
    assert code == 0 and "; none of its pods was running yet; continue: yaongi resume" in said, error
    assert not server.has(jobs_at(kind))
    assert yaongi("resume", name)[0] == 0
    (again,) = server.has(jobs_at(kind))
    assert again["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "suspend" not in again["spec"] and "suspend" not in again["spec"].get("runPolicy", {}), "Kueue decides"


def test_a_deactivated_run_is_activated_by_resume(server, kind, yaongi):
    name = queued(server, kind, active=False)["metadata"]["name"]
    server.asked.clear()
    code, said, error = yaongi("resume", name)
    assert code == 0 and f"job {name} continues" in said, error
    changed = [path for command, path in server.asked if command != "GET"]
    assert changed == [f"/apis/kueue.x-k8s.io/v1beta2/namespaces/team/workloads/{name}"]
