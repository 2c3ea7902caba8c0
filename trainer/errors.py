"""The errors that this program foresees: each class is one row of the table of exit codes. Imports no torch.

Whatever else ends a process is a fault of the program: it shows its traceback and ends with `ExitCode.FAULT`. So raise
one of these where the cause is met, and catch these alone; a ValueError of a library says nothing about the person.
"""

from __future__ import annotations

import errno
import re

from trainer.exitcodes import ExitCode


class ForeseenError(Exception):
    """What a person can mend. The message is complete: what, where (field, file, line), how to mend.

    `code` is what the process ends with.
    """

    code: int


class SpecError(ForeseenError, ValueError):
    """A spec or command line that cannot be used; one line for each problem. A validator of pydantic may raise it."""

    code = ExitCode.SPEC


class DataError(ForeseenError):
    """Data that cannot be used: missing, unfinished, changed or malformed. Names the file and the remedy."""

    code = ExitCode.DATA


class CheckpointError(ForeseenError):
    """A checkpoint, or another file that a run has left, is damaged."""

    code = ExitCode.CHECKPOINT


class LaunchError(ForeseenError):
    """Something cannot be done as things stand: a run is in the way or missing, a job or server does not answer.

    A launched task that ends by itself gives its own exit code as `code`.
    """

    code: int = ExitCode.UNAVAILABLE

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = int(code)


class DivergedError(ForeseenError):
    """The training has diverged."""

    code = ExitCode.DIVERGED


class BudgetError(ForeseenError):
    """The training was restarted too often without getting any further."""

    code = ExitCode.BUDGET


class VolumeError(ForeseenError):
    """A file or volume of this machine cannot be used: full, too slow, read-only, no permission."""

    code = ExitCode.VOLUME


class LimitError(ForeseenError):
    """The deadline has passed, or the launcher is gone."""

    code = ExitCode.LIMIT


class CommunicationError(ForeseenError):
    """Another rank cannot be reached, or cannot be understood."""

    code = ExitCode.COMMUNICATION


class GpuError(ForeseenError):
    """A GPU is missing or computes wrong numbers."""

    code = ExitCode.GPU


_NUMBERS = re.compile(r"\[Errno -?\d+\] ?| \(os error \d+\)|<[\w.]+ object at 0x\w+>: ?")
_FULL = "the volume is full; make room and run again, finished work is kept"
_TOO_LARGE = "a file would be larger than this process or the volume allows; raise the limit (ulimit -f) and run again"
_DENIED = "permission denied; mend its rights or owner, or give another place"
_BROKEN = "{}; look at the volume (its mount, its server, the kernel's log) and run again"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a file cannot grow
_OF_THE_MACHINE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,  # of the quota there
    errno.EFBIG: f"{_TOO_LARGE}, finished work is kept",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "the volume is mounted read-only; mount it for writing, or give another place",
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
    errno.ENOTCONN: _BROKEN,
    errno.EMFILE: "too many open files; raise the limit (ulimit -n) and run again",
    errno.ENFILE: "too many open files on this machine; close some and run again",
}


def in_words(error: object) -> str:
    """The first line of what an error says without the system's numbers; its class where it says nothing."""
    lines = _NUMBERS.sub("", str(error)).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def of_the_machine(error: BaseException, where: object = None) -> VolumeError | None:
    """The foreseen error that an OSError is when the machine is its cause; None for any other.

    Args:
        where: what to name for an error that names no file, such as that of a full volume.
    """
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return None
    place = error.filename if error.filename is not None else where
    said = _OF_THE_MACHINE[error.errno].format(error.strerror)
    return VolumeError(said if place is None else f"{place}: {said}")


def foreseen(error: BaseException) -> ForeseenError | None:
    """The foreseen error that `error` is, or stands for; None for a fault of the program."""
    return error if isinstance(error, ForeseenError) else of_the_machine(error)
