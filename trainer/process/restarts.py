"""Restart budget: how often a node may restart without progress of the run.

The operator recreates a failed pod without limit, so a run that dies at the same step each time (memory, a bad batch)
would hold its GPUs forever. The count is in `run_dir/restarts.json`, one entry per node, because a new pod has no
memory of it; it is incremented at the start, because a killed pod cannot do it at its end. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from trainer.errors import BudgetError
from trainer.exitcodes import STOPS, ExitCode, retryable
from trainer.files import atomic_write
from trainer.process.failures import OUT_OF_MEMORY_LABEL, PEER_STOPPED, code_label

log = logging.getLogger(__name__)

REASONS = (*(code_label(code) for code in ExitCode if retryable(code)), OUT_OF_MEMORY_LABEL, PEER_STOPPED)
ECHOES = (
    code_label(ExitCode.HANG),
    code_label(ExitCode.COMMUNICATION),
    PEER_STOPPED,
)  # these are for all nodes together


@dataclass
class NodeRecord:
    """The starts of one node. Times are Unix seconds; the deadline counts from `first_start`, the run's age from
    `begun`.

    `exit_code` is None while it runs, and stays None if it was killed; `ended` is a more specific word for it.
    `reasons` counts the restarts by that word.
    """

    first_start: float = field(default_factory=time.time)
    step: int = 0
    without_progress: int = 0
    total: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    exit_code: int | None = None
    ended: str = ""
    begun: float = 0.0  # version 0.1 did not write it

    def __post_init__(self) -> None:
        self.begun = self.begun or self.first_start


_Nodes = TypeAdapter(dict[str, NodeRecord])


def begin(
    run_dir: str | Path, max_restarts: int, step: int, task: str = "train", node: str | None = None
) -> NodeRecord:
    """Count this start of `task` on this node; the run's newest checkpoint is of `step`.

    A start after success or a permanent failure is a person's decision: budget and deadline are reset. A start after a
    stop signal, or after a new checkpoint since the last start, is free. After a stop signal the deadline is reset too,
    because a person may resume days later. An evicted pod looks the same from here, so a job that must end in time
    although its pods move relies on its launcher, which has its own timeout.

    Raises:
        BudgetError: `max_restarts` consecutive starts made no progress.
    """
    with _locked(_file(run_dir, task)) as nodes:
        key = node or socket.gethostname()
        if key not in nodes:
            record = NodeRecord(step=step)
        else:
            record = nodes[key]
            code = ExitCode.KILLED if record.exit_code is None else record.exit_code
            if not retryable(code):
                record = NodeRecord(step=step, total=record.total, reasons=record.reasons, begun=record.begun)
            elif step != record.step:  # it is lower in a run that was lengthened and went back to before its decay
                record.without_progress = 0
            elif code not in STOPS:
                record.without_progress += 1
            if code in STOPS:
                record.first_start = time.time()
            if retryable(code):
                record.total += 1
                reason = record.ended or code_label(code)
                record.reasons[reason] = record.reasons.get(reason, 0) + 1
            record.step, record.exit_code, record.ended = step, None, ""
        nodes[key] = record
        if record.without_progress > max_restarts:
            record.exit_code = int(ExitCode.BUDGET)
            often = ", ".join(f"{count}× {reason}" for reason, count in record.reasons.items())
            raise BudgetError(
                f"restarted {max_restarts} times at step {step} without getting further ({often}); "
                "fix the cause and resume, or raise train.runtime.max_restarts",
            )
        return record


def end(run_dir: str | Path, exit_code: int, task: str = "train", node: str | None = None, reason: str = "") -> None:
    """Record how this start ended; a `reason` of "" means the exit code's name."""
    with _locked(_file(run_dir, task)) as nodes:
        key = node or socket.gethostname()
        if key in nodes:
            nodes[key].exit_code, nodes[key].ended = int(exit_code), reason


def summary(run_dir: str | Path) -> dict[str, int]:
    """Restarts of the training so far by cause; their sum is `count`, or more where nodes failed at once.

    A lost node also makes the others restart, because they lose their peer or are stopped: these restarts count only if
        no
    node has its own cause. A killed entrypoint counts as `killed`, even if the whole container ran out of memory, which
    the next pod cannot know.
    """
    by_node = [Counter(node.reasons) for node in _read(_file(run_dir, "train")).values()]
    causes = Counter({reason: n for reason, n in sum(by_node, Counter()).items() if reason not in ECHOES})
    unexplained = count(run_dir) - causes.total()
    for reason in ECHOES:
        of_any_node = max((node[reason] for node in by_node), default=0)
        if (found := min(unexplained, of_any_node)) > 0:
            causes[reason] = found
            unexplained -= found
    return dict(causes)


def count(run_dir: str | Path) -> int:
    """How often the training was restarted: the loss of a node and the restarts of its peers count once."""
    return max((node.total for node in _read(_file(run_dir, "train")).values()), default=0)


def begun(run_dir: str | Path) -> float | None:
    """Time of the first start of the training; None if no start is known."""
    return min((node.begun for node in _read(_file(run_dir, "train")).values()), default=None)


def _file(run_dir: str | Path, task: str) -> Path:
    return Path(run_dir) / ("restarts.json" if task == "train" else f"restarts-{task}.json")


@contextmanager
def _locked(file: Path) -> Iterator[dict[str, NodeRecord]]:
    """The nodes' entries, to change in place; written back at exit, even after an exception."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        nodes = _read(file)
        try:
            yield nodes
        finally:
            entries = {key: asdict(record) for key, record in nodes.items()}
            atomic_write(file, json.dumps({"nodes": entries}, indent=1).encode())


def _read(file: Path) -> dict[str, NodeRecord]:
    try:
        return _Nodes.validate_python(json.loads(file.read_bytes())["nodes"])
    except FileNotFoundError:
        return {}  # the first start
    except (OSError, ValueError, KeyError, TypeError) as error:  # only the count is lost, not the run
        log.warning("%s cannot be read (%s); the restart count is reset", file, type(error).__name__)
        return {}
