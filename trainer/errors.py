"""The errors that this program foresees: each class is one row of the table of exit codes. Imports no torch.

Any other error is a bug: it prints its traceback and ends with `ExitCode.FAULT`. So raise one of these at the cause,
and catch only these; a library's ValueError does not mean that the user made a mistake.
"""

from __future__ import annotations

import errno
import re

from trainer.exitcodes import ExitCode


def first_line(error: BaseException) -> str:
    """Of what an error says, which may be pages; its class if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class ForeseenError(Exception):
    """An error that a person can fix. The message is complete: what, where (field, file, line), and the fix.

    `code` is the exit code.
    """

    code: int


class SpecError(ForeseenError, ValueError):
    """An invalid spec or command line; one line per problem. A pydantic validator may raise it."""

    code = ExitCode.SPEC


class DataError(ForeseenError):
    """Unusable data: missing, unfinished, changed or malformed. Names the file and the remedy."""

    code = ExitCode.DATA


class CheckpointError(ForeseenError):
    """A checkpoint, or another file of a run, is damaged."""

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
    """The training was restarted too often without progress."""

    code = ExitCode.BUDGET


class GateError(ForeseenError):
    """The trained model did not pass a gate of its spec."""

    code = ExitCode.GATE


class VolumeError(ForeseenError):
    """A file or volume of this machine cannot be used: full, too slow, read-only, no permission."""

    code = ExitCode.VOLUME


class LimitError(ForeseenError):
    """The deadline has passed, or the launcher is gone."""

    code = ExitCode.LIMIT


class CommunicationError(ForeseenError):
    """Another rank cannot be reached, or sent wrong data."""

    code = ExitCode.COMMUNICATION


class GpuError(ForeseenError):
    """A GPU is missing or computes wrong numbers."""

    code = ExitCode.GPU


_NUMBERS = re.compile(r"\[Errno -?\d+\] ?| \(os error \d+\)|<[\w.]+ object at 0x\w+>: ?")
_FULL = "the volume is full; make room and run again, finished work is kept"
_TOO_LARGE = "a file would be larger than this process or the volume allows; raise the limit (ulimit -f) and run again"
_DENIED = "permission denied; fix its permissions or owner, or give another place"
_BROKEN = "{}; check the volume (its mount, its server, the kernel's log) and run again"
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
    """The first line of an error's message without errno numbers; its class if the message is empty."""
    lines = _NUMBERS.sub("", str(error)).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def of_the_machine(error: BaseException, where: object = None) -> VolumeError | None:
    """The foreseen error for an OSError caused by the machine; None for any other OSError.

    Args:
        where: the place to name if the error has no file, as for a full volume.
    """
    if not isinstance(error, OSError) or error.errno not in _OF_THE_MACHINE:
        return None
    place = error.filename if error.filename is not None else where
    said = _OF_THE_MACHINE[error.errno].format(error.strerror)
    return VolumeError(said if place is None else f"{place}: {said}")


def foreseen(error: BaseException) -> ForeseenError | None:
    """The foreseen error that `error` is or maps to; None for a bug."""
    return error if isinstance(error, ForeseenError) else of_the_machine(error)
