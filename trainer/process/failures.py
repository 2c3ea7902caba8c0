"""From an exception or a dead process to an exit code and one line of reason.

Every rank that fails writes a small file to the directory that its entrypoint names in the environment. The entrypoint
reads all of them, because the rank that torchrun sees die first is often only a victim of another. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.errors import foreseen, in_words
from trainer.exitcodes import MEANING, STOPS, ExitCode, retryable

DIRECTORY_VARIABLE = "YAONGI_FAILURES"
NODE_VARIABLE = "NODE_NAME"  # a pod's own hostname is that of the pod
PEER_STOPPED, OUT_OF_MEMORY_LABEL = "peer_stopped", "out_of_memory"
OUT_OF_MEMORY = "out of memory; lower train.batch.micro_batch_rows or give the pod more"
_OUT_OF_MEMORY = re.compile(r"out of (GPU )?memory")
_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket timeout|timed out", re.I)
_PLACE = re.compile(r"^\[\S*gloo/\S*\] ")  # paths in the library's source
_JOKE = re.compile(r"\s*GLHF!.*$")
PEER_GONE = "most often that rank's process has died, and its own or its node's line says why; else check the network"
_GPU = re.compile(r"cuda error|cublas|cudnn|device-side|acceleratorerror", re.I)


@dataclass(frozen=True)
class Failure:
    """How one process ended. `time` is in Unix seconds."""

    rank: int
    code: int
    reason: str
    time: float = field(default_factory=time.time)


def node_name() -> str:
    """The machine's name for people: the cluster's node name, else the hostname."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def classify(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line reason for the exception that ended a rank."""
    text = " ".join(str(error).split())
    named = f"{type(error).__name__}: {text}"
    if (known := foreseen(error)) is not None:
        return known.code, str(known)
    if isinstance(error, MemoryError):
        return ExitCode.KILLED, f"{OUT_OF_MEMORY} ({named})"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, RuntimeError):
        if isinstance(error, torch.OutOfMemoryError):
            return ExitCode.KILLED, f"out of GPU memory; lower train.batch.micro_batch_rows ({named})"
        if isinstance(error, torch.distributed.DistError) or _COMMUNICATION.search(text):
            return ExitCode.COMMUNICATION, f"{type(error).__name__}: {_without_place(text)}; {PEER_GONE}"
        if isinstance(error, torch.AcceleratorError) or _GPU.search(text):
            return ExitCode.GPU, named
    return ExitCode.FAULT, named


def label(failure: Failure) -> str:
    """The cause by which restarts are counted: the exit code's name, or a more specific one if known."""
    if failure.code == ExitCode.KILLED and _OUT_OF_MEMORY.match(failure.reason):
        return OUT_OF_MEMORY_LABEL
    if failure.code in STOPS:  # this node was not told to stop, else `label` is not called
        return PEER_STOPPED
    return code_label(failure.code)


def code_label(code: int) -> str:
    """An exit code's name as a value of a metric label: killed, communication, …"""
    return ExitCode(code).name.lower() if code in list(ExitCode) else str(code)


def _without_place(text: str) -> str:
    return in_words(_JOKE.sub("", _PLACE.sub("", text)))


def show(error: BaseException, code: int, reason: str) -> None:
    """Print one line, and the traceback only for an error that the program did not expect.

    Communication errors are expected when any rank dies, and their place in the program does not explain them. The
    rank's log file has their traceback too.
    """
    if (foreseen(error) is None and code != ExitCode.COMMUNICATION) or os.environ.get("YAONGI_VERBOSE"):
        traceback.print_exception(error)
    print(f"error {code} ({meaning(code)}): {reason}", file=sys.stderr, flush=True)


def meaning(code: int) -> str:
    """The meaning of an exit code, even of one that is not in the table."""
    return MEANING[ExitCode(code)] if code in list(ExitCode) else "not one of this program's codes"


def record(code: int, reason: str) -> None:
    """Write a file for the entrypoint, if one started this process; never raises, because it runs during failures."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if not directory:
        return
    failure = Failure(int(os.environ.get("RANK", "0")), int(code), reason)
    try:
        target = Path(directory) / f"rank-{failure.rank}.json"
        draft = target.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        print(f"the reason could not be recorded: {in_words(error)}", file=sys.stderr)


def forget() -> None:
    """Remove the record of an earlier attempt of this rank; torchrun may restart ranks in place."""
    if directory := os.environ.get(DIRECTORY_VARIABLE):
        (Path(directory) / f"rank-{os.environ.get('RANK', '0')}.json").unlink(missing_ok=True)


def recorded(directory: Path) -> list[Failure]:
    """All failures that ranks have recorded."""
    return [Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in sorted(directory.glob("rank-*.json"))]


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that explains the others.

    A permanent one (bad data, divergence) has priority, because a retry cannot help. Next is a failure of a process
    itself, then lost communication, mostly a consequence of a peer's death, and last the stop signal that torchrun
    sends to the survivors. Among equals the earliest wins.
    """

    def rank_of(failure: Failure) -> tuple[int, float]:
        if not retryable(failure.code):
            return 0, failure.time
        if failure.code in STOPS:
            return 3, failure.time
        return (2 if failure.code == ExitCode.COMMUNICATION else 1), failure.time

    return min(failures, key=rank_of)
