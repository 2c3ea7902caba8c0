"""A small server with what reading a bucket needs: S3 (list, head, get with ranges) and Google's JSON API.

Faults are given by key and used once each, in order: a status, or "reset" (cut halfway).
"""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from hub_server import Served, send


class BucketServer(Served):
    """`objects` of the bucket "texts" by key."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.faults: dict[str, list[str]] = {}
        self.ranges: list[tuple[str, str]] = []  # key, Range of each GET
        self.stamps = {"ETag", "Last-Modified"}  # what answers say of an object's version
        self.modified = dict.fromkeys(objects, "Mon, 01 Jan 2024 00:00:00 GMT")
        super().__init__()

    def replace(self, key: str, data: bytes) -> None:
        self.objects[key], self.modified[key] = data, "Tue, 02 Jan 2024 00:00:00 GMT"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        if google := re.match(r"(?:/download)?/storage/v1/b/texts/o(?:/(.*))?$", path):
            if google[1] is None:
                items = [self._resource(key) for key in self._below(query.get("prefix", ""))]
                return send(handler, 200, json.dumps({"items": items}).encode(), {"Content-Type": "application/json"})
            if query.get("alt") != "media":
                return self._described(handler, google[1])
            return self._get(handler, google[1])
        key = path.removeprefix("/texts").removeprefix("/")
        if not key:
            return send(handler, 200, self._listing(query.get("prefix", "")), {"Content-Type": "application/xml"})
        self._get(handler, key)

    def _below(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def _listing(self, prefix: str) -> bytes:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{_etag(self.objects[key])}</ETag><Size>{len(self.objects[key])}</Size></Contents>"
            for key in self._below(prefix)
        )
        head = f"<Name>texts</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{found}</ListBucketResult>".encode()

    def _resource(self, key: str) -> dict[str, str]:
        data = self.objects[key]
        return {"name": key, "bucket": "texts", "size": str(len(data)), "etag": _etag(data), "kind": "storage#object"}

    def _described(self, handler: BaseHTTPRequestHandler, key: str) -> None:
        if key not in self.objects:
            return send(handler, 404, b'{"error": {"code": 404, "message": "No such object"}}', {})
        send(handler, 200, json.dumps(self._resource(key)).encode(), {"Content-Type": "application/json"})

    def _get(self, handler: BaseHTTPRequestHandler, key: str) -> None:
        if key not in self.objects:
            return send(handler, 404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        data, status, wanted = self.objects[key], 200, handler.headers.get("Range") or ""
        said = {"ETag": _etag(data), "Last-Modified": self.modified[key]}
        headers = {"Accept-Ranges": "bytes"} | {name: said[name] for name in self.stamps}
        fault = None
        if handler.command == "GET":
            self.ranges.append((key, wanted))
            fault = (self.faults.get(key) or [None]).pop(0)
        if fault and fault.isdigit():
            return send(handler, int(fault), b"<Error><Code>SlowDown</Code></Error>", {})
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted):
            start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        send(handler, status, data, headers, cut=fault == "reset")


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
