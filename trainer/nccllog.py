"""NCCL's log of what it sets up, in a file of this process: only there does NCCL say which network it takes."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

_LEVEL, _FILE = "NCCL_DEBUG", "NCCL_DEBUG_FILE"
_own: list[Path] = []


def begin() -> None:
    """Let NCCL write what it sets up into a file; call before the first communicator, which reads the variables.

    A user's own NCCL_DEBUG stays as it is, and so does where its lines go.
    """
    if _LEVEL in os.environ:
        return
    _own.append(Path(tempfile.mkdtemp(prefix="yaongi-nccl-")))
    os.environ |= {_LEVEL: "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", _FILE: f"{_own[-1]}/%p.log"}


def read() -> str | None:
    """What NCCL has written so far; None if it writes to stdout or elsewhere.

    Removes our own file, to which NCCL may go on writing.
    """
    pattern = os.environ.get(_FILE)
    if not pattern:
        return None
    host = socket.gethostname().split(".")[0]  # as NCCL replaces it
    try:
        text = Path(pattern.replace("%h", host).replace("%p", str(os.getpid()))).read_text(errors="replace")
    except OSError:
        return None
    while _own:
        shutil.rmtree(_own.pop(), ignore_errors=True)
    return text
