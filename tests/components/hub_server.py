"""A small server with the part of the Hugging Face Hub's HTTP API that reading a dataset or a model needs.

Info at a revision, tree and paths-info with LFS checksums, and resolve with byte ranges; also objects of a bucket
under /content/. Faults are given by path; each is used once, in order.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Served:
    """A context manager of a server on this machine; `answer` answers every request."""

    def __init__(self) -> None:
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                served.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError


class HubServer(Served):
    """`files` of the dataset org/texts by path, and of other `datasets`, or models, by name.

    Faults: a status, with "+seconds" for Retry-After, "reset" (cut halfway), "wrong" (other bytes), "short" (too few).
    """

    def __init__(
        self,
        files: dict[str, bytes],
        faults: dict[str, list[str]] | None = None,
        datasets: dict[str, dict[str, bytes]] | None = None,
    ) -> None:
        self._all = {"org/texts": files} | (datasets or {})
        self.reset()
        self.faults = faults or {}
        super().__init__()

    def reset(self) -> None:
        """Forget faults, changes and requests."""
        self.datasets = {name: dict(files) for name, files in self._all.items()}
        self.commits = dict.fromkeys(self.datasets, COMMIT)  # of main; COMMIT stays available when main moves
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.times: list[tuple[float, str]] = []
        self.tokens: set[str | None] = set()
        self.gated: int | None = None  # the status of requests for files, as without access to a gated repository

    def ranges_of(self, path: str) -> list[str | None]:
        return [wanted for method, asked, wanted in self.requests if method == "GET" and asked.endswith(path)]

    @property
    def files(self) -> dict[str, bytes]:
        return self.datasets["org/texts"]

    @files.setter
    def files(self, files: dict[str, bytes]) -> None:
        self.datasets["org/texts"] = files

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        self.times.append((time.monotonic(), path))
        self.tokens.add(handler.headers.get("Authorization"))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if path.startswith("/content/"):
            return self._object(handler, path.removeprefix("/content/"))
        # Files of a dataset are under /datasets, those of a model under its name.
        found = re.match(r"(?:/api/models/|(?:/api)?/datasets/|/(?!api/|datasets/))([^/]+/[^/]+)(?:/|$)(.*)", path)
        if not found or found[1] not in self.datasets:
            return send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        name, rest = found[1], found[2]
        commits = {"main": self.commits[name], COMMIT: COMMIT, self.commits[name]: self.commits[name]}
        if path.startswith("/api"):
            if self._fault("api"):
                return send(handler, 500, b"{}", {})
            parts = rest.strip("/").split("/", 2)
            if len(parts) > 1 and parts[1] not in commits:
                return send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            recursive = "recursive=true" in urlsplit(handler.path).query.lower()
            commit = commits[parts[1] if len(parts) > 1 else "main"]
            return send(handler, 200, json.dumps(self._api(name, commit, parts, body, recursive)).encode(), {})
        if self.gated:
            return send(handler, self.gated, b"", {"X-Error-Code": "GatedRepo"})
        commit, _, file = rest.removeprefix("resolve/").partition("/")
        if file not in self.datasets[name] or commit not in commits:
            return send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self._file(handler, self.datasets[name][file], file, commit)

    def _api(self, name: str, commit: str, rest: list[str], body: bytes, recursive: bool) -> object:
        files = self.datasets[name]
        kind = rest[0] if rest else ""
        if kind == "tree":
            folder = rest[2] + "/" if len(rest) > 2 else ""
            below = [path for path in files if path.startswith(folder)]
            folders = {folder + path.removeprefix(folder).split("/")[0] for path in below if "/" in path[len(folder) :]}
            entries = [_entry(path, files[path]) for path in below if recursive or "/" not in path[len(folder) :]]
            return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        if kind == "paths-info":
            return [_entry(path, files[path]) for path in parse_qs(body.decode()).get("paths", []) if path in files]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    def _file(self, handler: BaseHTTPRequestHandler, data: bytes, name: str, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        fault = self._fault(name) if handler.command == "GET" else None
        if fault and fault[0].isdigit():
            return _fail(handler, fault)
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        send(handler, status, data, headers, cut=fault == "reset")

    def _object(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        fault = self._fault(name)
        if fault and fault[0].isdigit():
            return _fail(handler, fault)
        data = self.objects.get(name)
        if data is None:
            return send(handler, 404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        if fault == "wrong":
            data = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        send(handler, 200, data, {"Content-Encoding": "gzip"}, cut=fault == "reset")

    def _fault(self, name: str) -> str | None:
        planned = self.faults.get(name)
        return planned.pop(0) if planned else None


def _entry(name: str, data: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if name.endswith((".parquet", ".gz", ".zst", ".safetensors")):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _fail(handler: BaseHTTPRequestHandler, fault: str) -> None:
    status, _, pause = fault.partition("+")
    send(handler, int(status), b"", {"Retry-After": pause} if pause else {})


def _wait_for_reader(connection: socket.socket) -> None:
    """Return shortly after the client has received everything that was sent, or after half a minute."""
    (_, port), (_, peer) = connection.getsockname(), connection.getpeername()
    ends = {f"{port:04X} {peer:04X}", f"{peer:04X} {port:04X}"}
    for _ in range(600):
        with open("/proc/net/tcp") as table:
            rows = [line.split() for line in list(table)[1:]]
        queues = [row[4] for row in rows if f"{row[1][-4:]} {row[2][-4:]}" in ends]
        if all(queue == "00000000:00000000" for queue in queues):  # bytes still to be sent, and to be read
            break
        time.sleep(0.05)
    time.sleep(0.3)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    handler.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        handler.wfile.flush()
        _wait_for_reader(handler.connection)  # the reset discards unread data
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True
