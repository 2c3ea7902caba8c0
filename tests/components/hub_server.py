"""A small server that speaks the part of the Hugging Face Hub's HTTP API that reading a dataset needs.

Dataset info at a revision, tree and paths-info with LFS checksums, and resolve with byte ranges. Faults are given by
path; each is used once, in order.
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


class HubServer:
    """`files` of the dataset org/texts by path. Faults: a status, "reset" (cut half way), "wrong" (other bytes)."""

    def __init__(self, files: dict[str, bytes], faults: dict[str, list[str]] | None = None) -> None:
        self.files, self.faults = files, faults or {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

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

    def ranges_of(self, path: str) -> list[str | None]:
        return [wanted for method, asked, wanted in self.requests if method == "GET" and asked.endswith(path)]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        self.tokens.add(handler.headers.get("Authorization"))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if not re.match(r"(/api)?/datasets/org/texts(/|$)", path):
            return _send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api"):
            if self._fault("api"):
                return _send(handler, 500, b"{}", {})
            rest = path.removeprefix("/api/datasets/org/texts").strip("/").split("/", 2)
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return _send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            recursive = "recursive=true" in urlsplit(handler.path).query.lower()
            return _send(handler, 200, json.dumps(self._api(rest, body, recursive)).encode(), {})
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in self.files:
            return _send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        self._file(handler, name)

    def _api(self, rest: list[str], body: bytes, recursive: bool) -> object:
        kind = rest[0] if rest else ""
        if kind == "tree":
            folder = rest[2] + "/" if len(rest) > 2 else ""
            below = [name for name in self.files if name.startswith(folder)]
            folders = {folder + name.removeprefix(folder).split("/")[0] for name in below if "/" in name[len(folder) :]}
            entries = [self._entry(name) for name in below if recursive or "/" not in name[len(folder) :]]
            return entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        if kind == "paths-info":
            return [self._entry(name) for name in parse_qs(body.decode()).get("paths", []) if name in self.files]
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": "org/texts", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

    def _entry(self, name: str) -> dict:
        data = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith((".parquet", ".gz")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        fault = self._fault(name) if handler.command == "GET" else None
        if fault and fault.isdigit():
            return _send(handler, int(fault), b"", {})
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        _send(handler, status, data, headers, cut=fault == "reset")

    def _fault(self, name: str) -> str | None:
        planned = self.faults.get(name)
        return planned.pop(0) if planned else None


def _send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: bool = False
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    handler.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        handler.wfile.flush()
        time.sleep(0.3)  # what was sent shall arrive before the reset, which would discard it
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True
