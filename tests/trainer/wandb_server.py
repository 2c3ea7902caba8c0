"""A small server that speaks what W&B's client speaks to its own: GraphQL for the run, a stream of its files' lines.

The queries are those of wandb 0.31; an unknown one is answered with an error and kept in `unknown`.
"""

from __future__ import annotations

import base64
import json
from contextlib import AbstractContextManager
from typing import Any

from json_server import JsonHandler, JsonServer, serving

ENTITY = "team"


class WandbServer(JsonServer):
    """
    Attributes:
        runs: by id: config, display name, lines of history, summary, exit code, and how often it was begun.
        unknown: names of queries that are not answered.
    """

    def __init__(self, key: str) -> None:
        super().__init__(_Handler)
        self.key, self.runs, self.unknown = key, dict[str, dict[str, Any]](), list[str]()


class _Handler(JsonHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        expected = "Basic " + base64.b64encode(f"api:{self.server.key}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self._answer(401, {"errors": [{"message": "user is not logged in"}]})
        elif self.path == "/graphql":
            with self.server.lock:
                body = json.loads(sent)
                self._answer(200, self._graphql(body["query"], body.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            with self.server.lock:
                self._stream(self.path.split("/")[-2], json.loads(sent))
            self._answer(200, {})
        else:
            self.server.unknown.append(self.path)
            self._answer(404, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[-1]
        entity = {"id": "e", "name": ENTITY}
        if name == "Viewer":
            me = {"id": "v", "entity": ENTITY, "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": me}}
        if name == "ServerFeaturesQuery":
            return {"data": {"serverInfo": {"features": []}}}
        if name == "RunResumeStatus":
            run = self.server.runs.get(given["name"])
            bucket = run and {
                "id": "b",
                "name": given["name"],
                "displayName": run["name"],
                "config": json.dumps(run["config"]),
                "wandbConfig": json.dumps({"t": 1}),
                "summaryMetrics": json.dumps(run["summary"]),
                "historyLineCount": len(run["history"]),
                "historyTail": json.dumps([json.dumps(line) for line in run["history"][-1:]]),
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "logLineCount": 0,
                "notes": None,
                "tags": [],
            }
            return {"data": {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}}
        if name == "UpsertBucket":
            new = {"name": "", "config": {}, "history": [], "summary": {}, "exit": None, "begun": 0}
            run = self.server.runs.setdefault(given["name"], new)
            run["begun"] += 1
            run["name"] = given.get("displayName") or run["name"]
            run["project"] = given["project"]
            run["config"] |= json.loads(given.get("config") or "{}")
            project = {"id": "p", "name": given["project"], "entity": entity}
            bucket = {
                "id": "b", "name": given["name"], "displayName": run["name"], "description": None, "sweepName": None,
                "config": json.dumps(run["config"]), "project": project, "historyLineCount": len(run["history"]),
            }  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": run["begun"] == 1}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.address}/put"} for file in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        self.server.unknown.append(name)
        return {"errors": [{"message": f"unknown query {name}"}]}

    def _stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.server.runs[name]
        files = body.get("files") or {}
        if lines := files.get("wandb-history.jsonl"):
            del run["history"][lines["offset"] :]
            run["history"] += [json.loads(line) for line in lines["content"]]
        if lines := files.get("wandb-summary.json"):
            run["summary"] = json.loads(lines["content"][-1])
        if body.get("complete"):
            run["exit"] = body["exitcode"]


def wandb_serving(key: str) -> AbstractContextManager[WandbServer]:
    return serving(WandbServer(key))
