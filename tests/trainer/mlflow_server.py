"""A small tracking server of MLflow: what our use of its client asks of the REST API (api/2.0/mlflow).

tests/peers has the real server.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from json_server import JsonHandler, JsonServer, serving


class MlflowServer(JsonServer):
    """
    Attributes:
        runs: by id: status, metrics as (key, step, value), params, tags.
        wanted: the only Authorization that is accepted; None accepts all.
    """

    def __init__(self, wanted: str | None) -> None:
        super().__init__(_Handler)
        self.wanted, self.experiments = wanted, dict[str, str]()
        self.runs, self.unknown = dict[str, dict[str, Any]](), list[str]()


class _Handler(JsonHandler):
    server: MlflowServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self._take(parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()})

    def do_POST(self) -> None:
        self._take(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _take(self, path: str, given: dict[str, Any]) -> None:
        if self.server.wanted and self.headers.get("Authorization") != self.server.wanted:
            self._answer(401, {"error_code": "UNAUTHENTICATED", "message": "no"})
            return
        with self.server.lock:
            status, answer = self._call(path.removeprefix("/api/2.0/mlflow/"), given)
        self._answer(status, answer)

    def _call(self, what: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        runs, experiments = self.server.runs, self.server.experiments
        if what == "experiments/get-by-name":
            name = given["experiment_name"]
            if name not in experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
            return 200, {"experiment": {"experiment_id": experiments[name], "name": name, "lifecycle_stage": "active"}}
        if what == "experiments/create":
            experiments[given["name"]] = str(len(experiments) + 1)
            return 200, {"experiment_id": experiments[given["name"]]}
        if what == "runs/create":
            name = f"{len(runs):032x}"
            runs[name] = {"status": "RUNNING", "metrics": [], "params": {}, "tags": {}, "name": given["run_name"]}
            return 200, {"run": self._run(name)}
        if what not in ("runs/get", "runs/update", "runs/log-batch"):
            self.server.unknown.append(what)
            return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": what}
        if given["run_id"] not in runs:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
        run = runs[given["run_id"]]
        if what == "runs/update":
            run["status"] = given.get("status", run["status"])
            return 200, {"run_info": self._run(given["run_id"])["info"]}
        if what == "runs/log-batch":
            run["metrics"] += [(each["key"], int(each["step"]), each["value"]) for each in given.get("metrics", [])]
            for part in ("params", "tags"):
                run[part] |= {each["key"]: each["value"] for each in given.get(part, [])}
            return 200, {}
        return 200, {"run": self._run(given["run_id"])}

    def _run(self, name: str) -> dict[str, Any]:
        info = {"run_id": name, "run_uuid": name, "experiment_id": "1", "status": self.server.runs[name]["status"]}
        return {"info": info | {"lifecycle_stage": "active", "artifact_uri": ""}, "data": {}}


def mlflow_serving(wanted: str | None = None) -> AbstractContextManager[MlflowServer]:
    return serving(MlflowServer(wanted))
