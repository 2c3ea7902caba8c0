"""Make records in child processes, within a time limit.

What ends a child in a comparison is a failed record, unless somebody else has killed it, and so is what hangs for the
second time: what has been compiled the first time is not compiled again. A module whose import ends it is refused from
then on. A new child goes on. A child that has failed in a comparison without dying goes on itself, unless its GPU has
become unusable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trainer.parity import Record
from trainer.proof.comparisons import Comparison
from trainer.proof.process import CHILD, Child

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """Seconds of a child's start or an import, of one comparison and of all together; bytes of the device's memory.

    The comparison that takes longest compiles about a hundred Triton kernels (an estimate), because it tunes itself.
    """

    start_seconds: float = 100.0
    comparison_seconds: float = 150.0
    all_seconds: float = 280.0
    memory_bytes: int = 4 * GIB


@dataclass
class Found:
    """What comparisons have shown.

    Attributes:
        unsupported: by comparison, why it cannot run here; None if it can.
        refused: by module, what its import does to a process.
        slow: comparisons that have taken too long; the second time, that is a record.
        problems: why some records are missing, a line each.
    """

    records: list[Record] = field(default_factory=list)
    unsupported: dict[str, str | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def prove(
    comparisons: Sequence[Comparison],
    device: torch.device,
    limits: Limits = Limits(),
    *,
    refused: dict[str, str] | None = None,
    slow: Sequence[str] = (),
    command: Sequence[str] | None = None,
    progress: Callable[[Comparison, str], None] = lambda comparison, outcome: None,
) -> Found:
    """Compare these, but of those that have a record ask only whether they can be imported.

    Args:
        refused: modules that must not be imported, with the reason.
        slow: comparisons that have taken too long before.
        command: of the child process, by default CHILD.
        progress: called with the outcome after each comparison.
    """
    found = Found(refused=dict(refused or {}), slow=[*slow])
    proving = _Proving(list(comparisons), device, limits, progress, time.monotonic() + limits.all_seconds, found)
    while proving.left:
        try:
            with Child(command or CHILD, proving.request()) as child:
                problem = proving.follow(child)
        except OSError as error:  # no memory, no more processes, …
            problem = f"the process of the comparisons cannot be started ({error.strerror})"
        if problem:
            names = ", ".join(map(str, proving.left))
            found.problems.append(f"{problem}; not compared: {names}")
            break
    return found


@dataclass
class _Proving:
    """The comparisons to come, the first of them running, and what has come of the others."""

    left: list[Comparison]
    device: torch.device
    limits: Limits
    progress: Callable[[Comparison, str], None]
    deadline: float
    found: Found

    def request(self) -> dict[str, object]:
        return {
            "device": str(self.device),
            "memory_bytes": self.limits.memory_bytes,
            "refused": self.found.refused,
            "comparisons": [[c.op, c.backend, c.variant, c.is_recorded(self.device)] for c in self.left],
        }

    def follow(self, child: Child) -> str | None:
        """Take a child's answers until it ends. Returns why nothing more can be expected; None: another may go on."""
        begun, importing, patience = False, None, self.limits.start_seconds
        while self.left:
            within = self.deadline - time.monotonic()
            line = child.line(min(patience, within))
            if line is None and within <= patience:
                return f"the comparisons took longer than {self.limits.all_seconds:g} s"
            ended = f"takes longer than {patience:g} s" if line is None else line.get("ended")
            if ended:
                killed = line is not None and line["killed"]
                return self._ended(ended, begun, importing, hangs=line is None, killed=killed)
            assert line is not None
            patience = self.limits.comparison_seconds
            if "importing" in line:
                importing = line["importing"]
                patience = self.limits.start_seconds if importing else patience
            else:
                begun = "begun" in line
            if "done" in line:
                self._take(line)
                if line["unusable"]:
                    return None
        return None

    def _ended(self, how: str, begun: bool, importing: str | None, *, hangs: bool, killed: bool) -> str | None:
        if not begun:
            return f"the process of the comparisons {how}"
        if importing and importing not in self.found.refused:
            package = importing.partition(".")[0]
            self.found.refused[importing] = f"{package} is installed but broken (its import {how})"
        elif killed:
            self.found.problems.append(f"{self.left.pop(0)} is not compared: its process {how}")
        elif hangs and str(self.left[0]) not in self.found.slow:
            self.found.slow.append(comparison := str(self.left.pop(0)))
            self.found.problems.append(f"{comparison} {how}, and is compared once more at the next start")
        else:
            self._keep(self.left[0].failed(how, self.device))
        return None

    def _take(self, line: dict) -> None:
        if "record" in line:
            self._keep(Record(**line["record"]))
            return
        comparison = self.left.pop(0)
        if "unfinished" in line:
            self.found.problems.append(f"{comparison} is not compared: {line['unfinished']}")
        else:
            self.found.unsupported[str(comparison)] = line.get("unsupported")

    def _keep(self, record: Record) -> None:
        comparison = self.left.pop(0)
        self.found.records.append(record)
        self.found.unsupported[str(comparison)] = None
        self.progress(comparison, record.outcome)
