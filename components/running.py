"""How a step of the pipeline speaks: a line when it starts, a line when it is done, and one line when it fails.

The failure line gives the exit code (trainer/exitcodes.py), what, where and how to mend; it ends the step's log on
Kubeflow Pipelines and is what `yaongi run` prints. An error that nobody foresaw keeps its traceback.
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

FAULT_HINT = "a fault of this program, not of what you wrote; please report it with its traceback"
STOP_FILE_VARIABLE = (
    "YAONGI_STOP_FILE"  # there once the run is to stop: the number of the signal (pipelines/stopping.py)
)
CLEANUP = "cleanup"  # the step that runs however the others end


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce the step `name` and serve its metrics. If what executes the pipeline is killed, so is the step.

    An error of its body becomes one line `error <exit code>: <name>: …` and that exit; a fault's traceback goes before.
    """
    from components.measuring import served  # the command line wants only the words

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
        # stdout, as the steps' own lines: the two streams must not overtake each other in a pod's log.
        print(f"error {code}: {name}: {message}", flush=True)
        sys.exit(code)


def told_to_stop() -> int:
    """Number of the signal by which a person has stopped the run that this process is part of; 0 for none."""
    try:
        return int(Path(os.environ[STOP_FILE_VARIABLE]).read_text(encoding="ascii") or signal.SIGTERM)
    except (KeyError, FileNotFoundError):
        return 0


def told(error: Exception, traceback_to: TextIO) -> tuple[int, str]:
    """Exit code and one line of an error; the traceback of a fault, or with YAONGI_VERBOSE of any, is printed."""
    known = foreseen(error)
    if known is None or os.environ.get("YAONGI_VERBOSE"):
        traceback.print_exception(error, file=traceback_to)
    if known is None:
        return int(ExitCode.FAULT), f"{type(error).__name__}: {one_line(error)} ({FAULT_HINT})"
    return int(known.code), one_line(known)


def one_line(error: BaseException) -> str:
    """The message of an error; the lines of one that reports several problems are joined."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
