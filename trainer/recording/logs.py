"""Log lines of a run, and its files of numbers: logs/metrics.jsonl with one line per step, validation.jsonl.

Reports and comparisons read them, so they must have each step at most once whatever happened: a resumed run first drops
the lines of steps that it will train again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_ONLY = "file_only"

log = logging.getLogger(__name__)


def setup(run_dir: str | Path, rank: int) -> None:
    """Rank 0 logs to stdout, the others only warnings; every rank has a file logs/rank-<n>.log with times."""
    directory = Path(run_dir) / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_Plain("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    console.addFilter(lambda record: not getattr(record, _FILE_ONLY, False))
    file = logging.FileHandler(directory / f"rank-{rank}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("trainer")
    root.setLevel(logging.INFO)
    root.handlers = [console, file]
    root.propagate = False


def note(text: str, error: BaseException) -> None:
    """Log to the rank's file only, with the traceback: the pod's output may be gone when somebody looks."""
    root = logging.getLogger("trainer")
    if root.handlers:  # else the run directory does not exist yet
        root.error(text, exc_info=error, extra={_FILE_ONLY: True})


class _Plain(logging.Formatter):
    """Plain messages; from WARNING on with the level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


METRICS, VALIDATIONS = "logs/metrics.jsonl", "validation.jsonl"  # one line per step, one per validation


class MetricsFile:
    """A file of a run with a line for some steps, such as logs/metrics.jsonl, open for appending after `resumed_step`.

    Attributes:
        dropped: the lines after `resumed_step`, of steps that are trained again.
    """

    def __init__(self, run_dir: str | Path, resumed_step: int, name: str = METRICS) -> None:
        self.path = Path(run_dir) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped: list[dict[str, Any]] = []
        self._unwritten = b""
        self._warned = False
        draft = self.path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as stream:
            for record in self.records():
                if record["step"] <= resumed_step:
                    stream.write(json.dumps(record) + "\n")
                else:
                    self.dropped.append(record)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self.path)
        # Unbuffered, so that a partial write reports how many bytes reached the disk.
        self._stream = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. Numbers that JSON cannot hold (NaN, infinity) become null.

        A disk error only warns; the line stays in memory for a later call.
        """
        self._unwritten += json.dumps(_finite(record)).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """fsync; a checkpoint of a step should not exist without the step's line."""
        self._flush(durably=True)

    def _flush(self, *, durably: bool = False) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
            if durably:
                os.fsync(self._stream.fileno())
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); its lines wait in memory", self.path, error.strerror)
            self._warned = True
        else:
            self._warned = False

    def records(self) -> Iterator[dict[str, Any]]:
        """All complete lines, including those in memory; a killed process may have left a partial one."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        for line in (data + self._unwritten).decode(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record

    def close(self) -> None:
        self._flush()
        self._stream.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
