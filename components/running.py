"""The output lines of a pipeline step: one when it starts, one when it is done, and one when it fails.

The failure line has the exit code (trainer/exitcodes.py), what, where and the fix; it ends the step's log on Kubeflow
Pipelines, and `yaongi run` prints it. An unforeseen error keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from components.marks import DONE, STARTED
from trainer.errors import foreseen
from trainer.exitcodes import ExitCode
from trainer.process.launcher import Launcher

FAULT_HINT = "a bug in this program, not in what you wrote; please report it with its traceback"
STOP_FILE_VARIABLE = (
    "YAONGI_STOP_FILE"  # exists once the run must stop; holds the signal number (pipelines/stopping.py)
)
CLEANUP = "cleanup"  # the step that always runs, however the others end


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce the step `name` and serve its metrics. If the process that executes the pipeline is killed, so is the
    step.

    An error in the block becomes one line `error <exit code>: <name>: …` and that exit code; a bug's traceback comes
    first.
    """
    from components.measuring import served  # the command line needs only the message

    Launcher().end_with()
    if (number := told_to_stop()) and name != CLEANUP:
        print(f"{name}: stopped before it began", flush=True)
        sys.exit(128 + number)
    start = time.monotonic()
    print(f"{STARTED}{name}", flush=True)
    try:
        with served(name.split()[0]):
            yield
            print(f"{DONE}{name} ({time.monotonic() - start:.1f} s)", flush=True)
    except Exception as error:
        code, message = told(error, traceback_to=sys.stdout)
        # To stdout, like the steps' own lines: in a pod's log, two streams can be out of order.
        print(f"error {code}: {name}: {message}", flush=True)
        sys.exit(code)


def told_to_stop() -> int:
    """Number of the signal that stopped the run of this process; 0 for none."""
    try:
        return int(Path(os.environ[STOP_FILE_VARIABLE]).read_text(encoding="ascii") or signal.SIGTERM)
    except (KeyError, FileNotFoundError):
        return 0


def told(error: Exception, traceback_to: TextIO) -> tuple[int, str]:
    """Exit code and one-line message of an error; prints the traceback of a bug, or of any error with
    YAONGI_VERBOSE."""
    known = foreseen(error)
    if known is None or os.environ.get("YAONGI_VERBOSE"):
        traceback.print_exception(error, file=traceback_to)
    if known is None:
        return int(ExitCode.FAULT), f"{type(error).__name__}: {one_line(error)} ({FAULT_HINT})"
    return int(known.code), one_line(known)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; several problems are joined."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
