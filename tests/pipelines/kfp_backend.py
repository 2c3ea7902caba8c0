"""A server that answers as a real Kubeflow Pipelines 2.17.0 has answered: from tests/fixtures/kfp, recorded there.

Its refusals (unknown run, no log, a run that cannot be terminated) are the recorded ones too. As the real one in its
single-user form, it has the log of a pod that has ended, by its node; none of a running pod; none at all where the
workflow is so large that Argo packs its nodes. A web interface in front of it has the logs of all pods.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

RECORDED = Path(__file__).parents[1] / "fixtures" / "kfp"
EXPERIMENT = {"experiment_id": "f494b03b-c7f9-44ee-8bd6-5ed34b4a6520", "display_name": "yaongi"}
HEALTHY = {"commit_sha": "unknown", "tag_name": "unknown", "multi_user": False, "pipeline_store": "database"}
LOGIN_PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>"


class Recorded:
    """A run as it was recorded. `run` is what v2beta1 answers; `workflow` Argo's object; `logs` by node."""

    def __init__(self, case: str) -> None:
        found = json.loads((RECORDED / f"{case}.json").read_text(encoding="utf-8"))
        self.run, self.run_v1 = found["run"], found["run_v1"]
        self.workflow, self.logs = found["workflow"], found["logs"]
        self.id: str = self.run["run_id"]

    @property
    def nodes(self) -> dict[str, Any]:
        return self.workflow["status"]["nodes"]

    def at(self, stamp: str) -> Recorded:
        """The run as it was at an earlier time: what came later has not begun, what lasted until then is running."""
        then = copy.deepcopy(self)
        then.run |= {"state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z"}
        then.run["state_history"] = [each for each in self.run["state_history"] if each["update_time"] <= stamp]
        then.run["state"] = then.run["state_history"][-1]["state"]
        for name, node in self.nodes.items():
            if node["startedAt"] > stamp or node["phase"] == "Omitted":
                del then.nodes[name]
            elif (node["finishedAt"] or "9") > stamp:
                then.nodes[name] |= {"phase": "Running", "finishedAt": None}
                then.nodes[name].pop("message", None)
        return then


class Backend(ThreadingHTTPServer):
    """`looks` are what a run looks like at each request for it, by id; the last one stays.

    Attributes:
        status: answered instead of anything else, if not 200.
        page: answer with a page of HTML; `page_of`: to requests whose path begins so.
        packed: pack the workflows' nodes.
        web: whether a web interface serves the logs of all pods.
        created: the bodies of created runs.
        headers: of the last request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.looks: dict[str, list[Recorded]] = {}
        self.now: dict[str, Recorded] = {}  # the look that was answered last, by run
        self.status, self.page, self.page_of = 200, False, ""
        self.packed, self.web = False, False
        self.away = range(0)  # the requests, counted from 1, that are refused while the backend is being replaced
        self.healthy: Any = HEALTHY
        self.experiments = [EXPERIMENT]
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.stopped: list[Recorded] = []  # what the run looks like after it was terminated
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def show(self, *looks: Recorded) -> str:
        """Serve a run; returns its id."""
        self.looks[looks[0].id] = list(looks)
        return looks[0].id


class Handler(BaseHTTPRequestHandler):
    server: Backend

    def send(self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status)

    def refuse(self, code: int, status: int, message: str) -> None:
        self.answer({"code": code, "message": message}, status)

    def handle_request(self) -> None:
        server, path = self.server, unquote(urlparse(self.path).path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        server.asked.append(f"{self.command} {path}")
        server.headers = dict(self.headers)
        if server.page or (server.page_of and path.startswith(server.page_of)):
            redirect = {"Location": "https://login.example/dex/auth?state=1"} if 300 <= server.status < 400 else {}
            self.send(LOGIN_PAGE, server.status, "text/html", **redirect)
        elif server.status != 200:
            self.refuse(16, server.status, "Unauthenticated: the token is not accepted")
        elif len(server.asked) in server.away:
            self.refuse(14, 503, "the backend is being replaced")
        elif path == "/apis/v2beta1/healthz":
            self.answer(server.healthy)
        elif path == "/apis/v2beta1/experiments":
            self.experiments(body)
        elif self.command == "POST" and path == "/apis/v2beta1/runs":
            server.created.append(body)
            (run_id,) = server.looks
            self.answer({"run_id": run_id, "display_name": body["display_name"]})
        elif path == "/k8s/pod/logs" and server.web:
            self.web_log(parse_qs(urlparse(self.path).query))
        else:
            self.of_run(path)

    do_GET = do_POST = handle_request

    def experiments(self, body: dict[str, Any]) -> None:
        if self.command == "POST":
            self.server.experiments.append(EXPERIMENT | body)
            self.answer(self.server.experiments[-1])
        else:
            found = self.server.experiments
            self.answer({"experiments": found, "total_size": len(found)} if found else {})

    def of_run(self, path: str) -> None:
        found = [(run_id, looks) for run_id, looks in self.server.looks.items() if f"/runs/{run_id}" in path]
        if not found:
            run_id = path.rpartition("/")[2]
            said = f"Failed to get a run: Failed to fetch run {run_id}: ResourceNotFoundError: Run not found"
            self.refuse(5, 404, said)
            return
        run_id, looks = found[0]
        now = self.server.now.get(run_id, looks[0])
        if path.startswith("/apis/v2beta1/") and self.command == "GET":
            now = self.server.now[run_id] = looks.pop(0) if len(looks) > 1 else looks[0]
            self.answer(now.run)
        elif path.endswith(":terminate"):
            if self.server.stopped:
                self.server.looks[run_id] = list(self.server.stopped)
                self.answer({})
            else:
                self.refuse(3, 400, f"Failed to terminate a run {run_id}. Row not found")
        elif path.endswith("/log"):
            self.log(now, path.split("/")[-2])
        else:
            self.answer(now.run_v1 | {"pipeline_runtime": {"workflow_manifest": json.dumps(self.manifest(now))}})

    def manifest(self, now: Recorded) -> Any:
        if not self.server.packed:
            return now.workflow
        status = {key: value for key, value in now.workflow["status"].items() if key != "nodes"}
        packed = base64.b64encode(gzip.compress(json.dumps(now.nodes).encode())).decode()
        return now.workflow | {"status": status | {"compressedNodes": packed}}

    def log(self, now: Recorded, node: str) -> None:
        if node in now.logs and now.nodes[node]["phase"] != "Running" and not self.server.packed:
            self.send(now.logs[node].encode(), kind="text/plain; charset=utf-8")
            return
        said = f"BadRequestError: Failed to read logs for run {now.id}: … NoSuchKey: The specified key does not exist."
        self.send(json.dumps({"error_message": said, "error_details": said}).encode(), kind="text/plain; charset=utf-8")

    def web_log(self, query: dict[str, list[str]]) -> None:
        now = self.server.now[query["runid"][0]]
        (pod,), (namespace,) = query["podname"], query["podnamespace"]
        for node, text in [(node, text) for node, text in now.logs.items() if node in now.nodes]:
            template, number = now.nodes[node]["templateName"], node.rpartition("-")[2]
            if pod == f"{now.workflow['metadata']['name']}-{template}-{number}" and namespace == "kubeflow":
                self.send(text.encode(), kind="text/plain")
                return
        self.send(f"Could not get main container logs: {pod}".encode(), 500, "text/plain")

    def log_message(self, *arguments: object) -> None:
        pass
