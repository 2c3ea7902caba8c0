"""Exit codes of every process: the table. trainer/errors.py has the errors that end in them.

The training operator treats 1-127 as permanent and 128 and above as "recreate the pod", so each code is on the right
side of that line. The same codes are used on one machine. Imports no torch.
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    UNEXPECTED = 1
    SPEC = 2
    FAULT = 3
    DATA = 65
    CHECKPOINT = 66
    UNAVAILABLE = 69
    DIVERGED = 70
    BUDGET = 71
    GATE = 72
    VOLUME = 74
    LIMIT = 75
    INTERRUPTED = 130
    KILLED = 137
    CRASHED = 139
    TERMINATED = 143
    COMMUNICATION = 160
    HANG = 161
    GPU = 162


MEANING: dict[ExitCode, str] = {
    ExitCode.OK: "all ranks finished all steps",
    ExitCode.UNEXPECTED: "ended without giving a reason; see the log",
    ExitCode.SPEC: "bad spec",
    ExitCode.FAULT: "a bug in this program; the traceback is in the log",
    ExitCode.DATA: "bad data",
    ExitCode.CHECKPOINT: "corrupt checkpoint, or another damaged file of a run",
    ExitCode.UNAVAILABLE: "cannot be done as things stand: something is missing, in the way or does not answer",
    ExitCode.DIVERGED: "training diverged",
    ExitCode.BUDGET: "restart budget spent",
    ExitCode.GATE: "the model did not pass a gate of its spec; it is not exported",
    ExitCode.VOLUME: "a file or volume cannot be used: full, read-only, no permission, too slow",
    ExitCode.LIMIT: "deadline passed or launcher gone; checkpoint saved",
    ExitCode.INTERRUPTED: "interrupted (SIGINT); checkpoint saved",
    ExitCode.KILLED: "killed (SIGKILL), most often for memory",
    ExitCode.CRASHED: "crashed (SIGSEGV, SIGABRT or SIGBUS)",
    ExitCode.TERMINATED: "stopped (SIGTERM); checkpoint saved",
    ExitCode.COMMUNICATION: "communication with another rank failed",
    ExitCode.HANG: "hang watchdog: no step finished in time",
    ExitCode.GPU: "GPU fault",
}

STOPS = frozenset({ExitCode.INTERRUPTED, ExitCode.TERMINATED})
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})


def retryable(code: int) -> bool:
    """Whether starting again from the last checkpoint can help (the operator's own rule: 128 and above)."""
    return code >= 128


def of_process(returncode: int) -> int:
    """Exit code for `Popen.returncode`, in which a negative number is the signal that ended the process."""
    if returncode >= 0:
        return returncode
    if -returncode in _CRASHES:
        return int(ExitCode.CRASHED)
    return 128 - returncode
