"""How a step of the pipeline speaks: a line when it starts, a line when it is done, and one line when it fails.

The failure line says what, where and how to mend; it ends the step's log on Kubeflow Pipelines and is what `yaongi run`
prints. An error that nobody foresaw keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from components.launch import LaunchError
from components.measuring import served
from trainer.exitcodes import ExitCode, TrainingError

# What a person can mend; ValueError covers SpecError and DataError.
FORESEEN = (ValueError, OSError, LaunchError, TrainingError)
STARTED, DONE, FAILED = "▶ ", "✓ ", "error: "


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce the step `name` and serve its metrics.

    A foreseen error of its body becomes one line `error: <name>: …` and an exit.
    """
    start = time.monotonic()
    print(f"{STARTED}{name}", flush=True)
    try:
        with served(name.split()[0]):
            yield
            print(f"{DONE}{name} ({time.monotonic() - start:.1f} s)", flush=True)
    except FORESEEN as error:
        if os.environ.get("YAONGI_VERBOSE"):
            traceback.print_exc(file=sys.stdout)
        # stdout, as the steps' own lines: the two streams must not overtake each other in a pod's log.
        print(f"{FAILED}{name}: {one_line(error)}", flush=True)
        sys.exit(getattr(error, "code", ExitCode.UNEXPECTED))


def one_line(error: BaseException) -> str:
    """The message of an error; the lines of one that reports several problems are joined."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
