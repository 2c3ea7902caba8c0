"""Where the wall time of a training went, over all its processes: run_dir/goodput.json, one entry for each process.

Prometheus' counters end with their process; this file does not. The time of a process that is in no class is `other`,
the time between two processes `down`, so the classes of `account` sum to the wall time. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trainer.files import atomic_write

log = logging.getLogger(__name__)

GOODPUT = "goodput.json"
WRITE_SECONDS = 10.0
# In the order of a bar, the useful one first.
CLASSES = {
    "step": "forward, backward and optimizer of steps that count",
    "data_wait": "waiting for tokens",
    "checkpoint": "training held up by a checkpoint",
    "validation": "validation during training",
    "startup": "from the start of a process to its first step",
    "other": "the rest of the processes' time: recording, end",
    "lost": "steps that were trained again after a restart",
    "down": "between two processes: waiting for a machine, loading programs",
    "unknown": "not recorded by an earlier version",
}


@dataclass(frozen=True)
class Process:
    """One process of rank 0, at `step` by `until`; times are Unix seconds.

    Attributes:
        seconds: by class, as in the metric goodput_seconds_total.
        lost: seconds of the steps of earlier processes that this one trains again.
        restarts: of the run by cause, when it started.
    """

    started: float
    until: float
    from_step: int
    step: int
    seconds: dict[str, float]
    lost: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)


_Processes = TypeAdapter(list[Process])


class Ledger:
    """The entry of this process, behind those of earlier ones."""

    def __init__(
        self, run_dir: str | Path, started: float, step: int, dropped: Sequence[dict[str, Any]], causes: dict[str, int]
    ) -> None:
        """
        Args:
            dropped: lines of metrics.jsonl after `step`, which this process trains again.
            causes: restarts so far by cause.
        """
        self._file = Path(run_dir) / GOODPUT
        self._earlier = read(run_dir)
        if self._earlier:
            self._earlier[-1] = settled(self._earlier[-1], dropped, started)
        lost = sum(line["seconds"] for line in dropped)
        self._own = Process(started, started, step, step, {}, lost, dict(causes))
        self._written = 0.0
        self._warned = False

    @property
    def restart(self) -> Restart | None:
        """Why this process began, if there were earlier ones."""
        found = restarts_of([*self._earlier, self._own])
        return found[-1] if found else None

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` that end now; the start lasts until the first of them."""
        if not self._own.seconds:
            self._own.seconds["startup"] = max(0.0, time.time() - seconds - self._own.started)
        self._own.seconds[name] = self._own.seconds.get(name, 0.0) + seconds

    def write(self, step: int, *, at_once: bool = False) -> None:
        """Write the file if the last time was WRITE_SECONDS ago. A disk error only warns."""
        now = time.time()
        if not at_once and now < self._written + WRITE_SECONDS:
            return
        self._written = now
        self._own = replace(self._own, step=step, until=max(now, self._own.started))
        entries = [asdict(process) for process in (*self._earlier, self._own)]
        try:
            atomic_write(self._file, json.dumps({"processes": entries}, indent=1).encode())
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); training goes on", self._file, error.strerror)
            self._warned = True


def read(run_dir: str | Path) -> list[Process]:
    """The processes so far; none, with a warning, if the file cannot be read, as training must not depend on it."""
    file = Path(run_dir) / GOODPUT
    try:
        return _Processes.validate_python(json.loads(file.read_bytes())["processes"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); where earlier time went is unknown", file, type(error).__name__)
        return []


def settled(last: Process, lines: Iterable[dict[str, Any]], before: float | None = None) -> Process:
    """A process with the steps that it did after it last wrote its entry; it ended before `before`."""
    later = [line for line in lines if line["step"] > last.step]
    if not later:
        return last
    seconds = sum(line["seconds"] for line in later)
    if before is not None:
        seconds = max(0.0, min(seconds, before - last.until))
    parts = {name: last.seconds.get(name, 0.0) for name in ("step", "data_wait")}
    if not any(parts.values()):
        parts["step"] = 1.0
    growth = seconds / sum(parts.values())  # a line has only the sum of the two
    added = last.seconds | {name: last.seconds.get(name, 0.0) + growth * part for name, part in parts.items()}
    return replace(last, until=last.until + seconds, seconds=added, step=max(line["step"] for line in later))


@dataclass(frozen=True)
class Restart:
    """A process after the first: when, from which step, why, and what the break has cost."""

    started: float
    from_step: int
    reached: int
    reason: str
    lost: float
    down: float


def account(
    processes: Sequence[Process], lines: Sequence[dict[str, Any]], begun: float | None, recorded: float = 0.0
) -> dict[str, float]:
    """Seconds of wall time by class (CLASSES), from the first start to the last entry.

    Args:
        lines: of metrics.jsonl.
        begun: Unix time of the run's first start, None if that is unknown.
        recorded: result.json's seconds, the wall time of a run of which no process has an entry.
    """
    totals: dict[str, float] = defaultdict(float)
    if not processes:
        totals["step"] = sum(line["seconds"] for line in lines)
        totals["unknown"] = max(0.0, recorded - totals["step"])
        return _shown(totals)
    first, *later = processes
    gap = max(0.0, first.started - (begun or first.started))
    if first.from_step:  # an earlier version trained until there
        before = sum(line["seconds"] for line in lines if line["step"] <= first.from_step)
        totals["step"] = min(before, gap)
        totals["lost"] = min(first.lost, gap - totals["step"])
        totals["unknown"] = gap - totals["step"] - totals["lost"]
    else:
        totals["startup"] = gap
    known = [*processes[:-1], settled(processes[-1], lines)]
    worked: dict[str, float] = defaultdict(float)
    for process in known:
        for name, seconds in process.seconds.items():
            worked[name] += seconds
        rest = max(0.0, process.until - process.started - sum(process.seconds.values()))
        totals["other" if process.seconds else "startup"] += rest
    for earlier, process in zip(known, later, strict=False):
        totals["down"] += max(0.0, process.started - earlier.until)
    # How much of the lost time was waiting for data is not known: as much as of all steps.
    steps = worked["step"] + worked["data_wait"]
    lost = min(sum(process.lost for process in later), steps)
    for name in ("step", "data_wait"):
        worked[name] *= 1 - lost / steps if steps else 1
    totals["lost"] += lost
    for name, seconds in worked.items():
        totals[name] += seconds
    return _shown(totals)


def restarts_of(processes: Sequence[Process]) -> list[Restart]:
    """The processes after the first, in order."""
    found = []
    for earlier, process in pairwise(processes):
        causes = Counter(process.restarts) - Counter(earlier.restarts)
        reason = ", ".join(causes.elements()) or "started again after its end"
        down = max(0.0, process.started - earlier.until)
        found.append(Restart(process.started, process.from_step, earlier.step, reason, process.lost, down))
    return found


def _shown(totals: dict[str, float]) -> dict[str, float]:
    """Without empty classes; classes of a later version come last."""
    order = [*CLASSES, *sorted(set(totals) - set(CLASSES))]
    return {name: totals[name] for name in order if totals[name] > 0}
