"""Ports for the servers that tests start."""

from __future__ import annotations

import os
import socket
from random import SystemRandom

# Below what Linux gives to outgoing connections and to servers that ask for any port (from 32768), and below the node
# ports of a cluster (from 30000): nobody gets such a port between our look and our server's start.
FIRST, LAST = 15_000, 29_999
WORKERS = 8  # of pytest at the same time; each has ports of its own, so that no two are given the same one
NEXT = 8  # more than the ports after the given one that a test also uses
_given: set[int] = set()


def free_port() -> int:
    """A port on which nothing listens, on any address; never the same one twice."""
    size = (LAST + 1 - FIRST) // WORKERS
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    while True:
        port = FIRST + worker * size + SystemRandom().randrange(size - NEXT)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        _given.add(port)
        return port
