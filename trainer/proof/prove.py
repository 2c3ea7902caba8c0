"""Make records in child processes, within a time limit.

What ends a child is a failed record, and a new child goes on with the next comparison.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

import torch

from trainer.parity import Record
from trainer.proof.comparisons import Comparison

CHILD = (sys.executable, "-m", "trainer.proof.child")
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """Seconds of a child's start, of one comparison and of all together; bytes of the device's memory."""

    start_seconds: float = 60.0
    comparison_seconds: float = 60.0
    all_seconds: float = 240.0
    memory_bytes: int = 4 * GIB


def prove(
    comparisons: Sequence[Comparison],
    device: torch.device,
    limits: Limits = Limits(),
    *,
    command: Sequence[str] | None = None,
    progress: Callable[[Comparison, Record], None] = lambda comparison, record: None,
) -> tuple[list[Record], list[str]]:
    """The records of these comparisons, and why some are missing, a line each.

    Args:
        command: of the child process, by default CHILD.
        progress: called after each comparison.
    """
    proving = _Proving(list(comparisons), device, limits, progress, time.monotonic() + limits.all_seconds)
    while proving.left:
        with _Child(command or CHILD, proving.left, device, limits.memory_bytes) as child:
            problem = proving.follow(child)
        if problem:
            names = ", ".join(map(str, proving.left))
            return proving.records, [*proving.unfinished, f"{problem}; not compared: {names}"]
    return proving.records, proving.unfinished


@dataclass
class _Proving:
    """The comparisons to come, the first of them running, and what has come of the others."""

    left: list[Comparison]
    device: torch.device
    limits: Limits
    progress: Callable[[Comparison, Record], None]
    deadline: float
    records: list[Record] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def follow(self, child: _Child) -> str | None:
        """Take a child's records until it ends. Returns why nothing more can be expected; None: another may go on."""
        begun, patience = False, self.limits.start_seconds
        while self.left:
            within = self.deadline - time.monotonic()
            line = child.line(min(patience, within))
            if line is None and within <= patience:
                return f"the comparisons took longer than {self.limits.all_seconds:g} s"
            ended = f"takes longer than {patience:g} s" if line is None else line.get("ended")
            if ended and begun:
                self._keep(self.left[0].failed(ended, self.device))
                return None
            if ended:
                return f"the process of the comparisons {ended}"
            assert line is not None
            begun, patience = "begun" in line, self.limits.comparison_seconds
            if "record" in line:
                self._keep(Record(**line["record"]))
            if "unfinished" in line:
                self.unfinished.append(f"{self.left.pop(0)} is not compared: {line['unfinished']}")
        return None

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self.progress(self.left.pop(0), record)


class _Child:
    """A child process and its lines."""

    def __init__(
        self, command: Sequence[str], comparisons: list[Comparison], device: torch.device, memory_bytes: int
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        request = {
            "device": str(device),
            "memory_bytes": memory_bytes,
            "comparisons": [[c.op, c.backend, c.variant] for c in comparisons],
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended at once, which its exit status tells
        self._lines: queue.Queue[dict] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if line.startswith((b'{"begun"', b'{"done"')):  # a package may print, too
                self._lines.put(json.loads(line))
        self._lines.put({"ended": self._end(self._process.wait())})

    def _end(self, status: int) -> str:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1].strip()[:200]}" if said else ""
        if status < 0:
            return f"crashes ({signal.Signals(-status).name}){last}"
        return f"ends with exit code {status}{last}"

    def line(self, seconds: float) -> dict | None:
        """The next line; {"ended": how} at the end; None if there is none within that time."""
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        self._errors.close()
