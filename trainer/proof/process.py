"""The child process of a proof as its parent sees it: lines of answers, and how it ends.

Nothing here waits for what a child leaves behind: compilers that it has started have its pipes, too.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

CHILD = (sys.executable, "-m", "trainer.proof.child")
KINDS = (b'{"begun"', b'{"done"', b'{"importing"')  # a package may print, too
SAID_BYTES = 16384  # of its last words
FLUSH_SECONDS = 2.0  # for what it has written before it ended
KILL_SECONDS = 10.0


class Child:
    """A child process and its lines, killed at the end of the block, with all that it has started.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], request: dict[str, object]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._said = b""
        readers = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_errors)]
        for thread in (*readers, threading.Thread(target=self._wait, args=(readers,), daemon=True)):
            thread.start()
        threading.Thread(target=self._ask, args=(json.dumps(request).encode(),), daemon=True).start()

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line; {"ended": how, "killed": by somebody else} at the end; None without one within that time."""
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def _ask(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it ended at once, which its exit status tells
            self._process.stdin.write(request)
            self._process.stdin.close()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(KINDS):
                with suppress(ValueError):  # cut off where it died
                    self._lines.put(json.loads(line))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while some := self._process.stderr.read1(SAID_BYTES):  # type: ignore[attr-defined]  # it is buffered
            self._said = (self._said + some)[-SAID_BYTES:]

    def _wait(self, readers: list[threading.Thread]) -> None:
        status = self._process.wait()
        until = time.monotonic() + FLUSH_SECONDS
        for reader in readers:
            reader.join(max(0.0, until - time.monotonic()))
        self._lines.put({"ended": self._end(status), "killed": status == -signal.SIGKILL})

    def _end(self, status: int) -> str:
        said = [line.strip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        last = f": {said[-1][:200]}" if said else ""
        if status == -signal.SIGKILL:  # which no kernel does to its own process
            return "is killed, as Linux does where memory runs out (see dmesg on the node; give the pod more)"
        if status < 0:
            return f"crashes ({signal.Signals(-status).name}){last}"
        return f"ends with exit code {status}{last}"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # nothing is left of it
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the driver does not let it go
            self._process.wait(KILL_SECONDS)
