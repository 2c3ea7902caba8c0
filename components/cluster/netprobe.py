"""Runs in the pods of `yaongi doctor --network`: one listens, others try to reach it. Standard library only.

The pods are handed this file's text, so that any image with Python will do.

    serve SECONDS PORT…            listen on these ports, then end
    try TARGETS                    JSON: name → [host, port, should be open]; prints SAID and JSON: name → what came

A host "" is the API server; port 0 asks for the host's address only.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

OPEN = "open"
SAID = "came: "  # before the JSON; the API's client would read a log that is JSON alone as something else
PATIENCE_SECONDS = 12.0  # the network may apply a policy some seconds after the pod's start
ATTEMPT_SECONDS, PAUSE_SECONDS = 2.0, 0.5
SURE = 2  # closed that often in a row: a single lost packet is no policy


def serve(seconds: float, ports: list[int]) -> None:
    """Accept connections and close them."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    chooser = selectors.DefaultSelector()
    for port in ports:
        listening = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
        chooser.register(listening, selectors.EVENT_READ)
    print("listening", flush=True)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        for key, _ in chooser.select(left):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.accept()[0].close()


def attempt(host: str, port: int) -> str:
    """`open`, or the error."""
    host, port = (
        (host, port) if host else (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
    )
    try:
        if port:
            socket.create_connection((host, port), ATTEMPT_SECONDS).close()
        else:
            socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror or str(error)
    return OPEN


def tried(target: tuple[str, int, bool]) -> str:
    """What came at last: tries until it is as wanted, or patience ends."""
    host, port, should_open = target
    deadline, closed, came = time.monotonic() + PATIENCE_SECONDS, 0, ""
    while time.monotonic() < deadline:
        came = attempt(host, port)
        closed = 0 if came == OPEN else closed + 1
        if (came == OPEN) if should_open else closed >= SURE:
            break
        time.sleep(PAUSE_SECONDS)
    return came


def main(action: str, *arguments: str) -> None:
    if action == "serve":
        serve(float(arguments[0]), [int(port) for port in arguments[1:]])
        return
    targets = json.loads(arguments[0])
    with ThreadPoolExecutor(len(targets)) as pool:
        came = dict(zip(targets, pool.map(tried, targets.values()), strict=True))
    print(SAID + json.dumps(came), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
