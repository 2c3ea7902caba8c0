"""Small servers that speak what the clients of trackers speak, for tests without the internet."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import json_server
from json_server import JsonServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PROJECT = "project-1"


class Server(JsonServer):
    """
    Attributes:
        requests: (method, path) of each request.
        events: what Langfuse got, decoded: name, trace and attributes.
        key: the Authorization that is accepted.
        hangs: while it is clear, nothing is answered.
    """

    def __init__(self, key: str) -> None:
        super().__init__(Handler)
        self.requests: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []
        self.key, self.answers = key, threading.Event()
        self.answers.set()


class Handler(BaseHTTPRequestHandler):
    """Langfuse: the projects of the keys, and spans of OpenTelemetry over HTTP in protobuf."""

    server: Server

    def do_GET(self) -> None:
        self._begin()
        project = {"id": PROJECT, "name": "p", "metadata": {}, "organization": {"id": "o", "name": "o"}}
        if not self._refused():
            self._answer(200, json.dumps({"data": [project]}).encode(), "application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._begin()
        if self._refused():
            return
        if self.path.endswith("/v1/traces"):
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            self.server.events += list(_decoded(body))
        self._answer(200, b"", "application/x-protobuf")

    def _begin(self) -> None:
        self.server.requests.append((self.command, self.path))
        self.server.answers.wait(120)

    def _refused(self) -> bool:
        if self.headers.get("Authorization") == self.server.key:
            return False
        self._answer(401, b'{"message": "invalid credentials"}', "application/json")
        return True

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def basic(public: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{public}:{secret}".encode()).decode()


def _decoded(body: bytes) -> Iterator[dict[str, Any]]:
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                attributes = {each.key: each.value.string_value for each in span.attributes}
                yield {"name": span.name, "trace": span.trace_id.hex(), "attributes": attributes}


@contextmanager
def serving(key: str = "") -> Iterator[Server]:
    with json_server.serving(Server(key)) as server:
        try:
            yield server
        finally:
            server.answers.set()
