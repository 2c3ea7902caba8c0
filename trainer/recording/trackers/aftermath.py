"""What the entrypoint tells the trackers of a training that could not do it itself: it failed, or was killed.

Imports no torch.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

from trainer.exitcodes import STOPS, ExitCode
from trainer.recording.trackers import state
from trainer.recording.trackers.base import STOPPED, EventName
from trainer.recording.trackers.keys import wanted
from trainer.recording.trackers.remote import tell as tell_trackers
from trainer.spec import TrainSpec

log = logging.getLogger("trainer.entrypoint")


def tell(spec: TrainSpec, code: int, reason: str, began: float, *, leads: bool) -> None:
    """Report the failed end of a training, once for all nodes; nothing if rank 0 has told the end.

    Args:
        began: Unix time of this start of the entrypoint.
        leads: whether this node speaks for all if rank 0 did not get as far as opening the trackers.
    """
    if wanted(spec) is None:
        return
    last = state.read(spec.run_dir)
    opened = last.started >= began  # rank 0 did, on some node
    if (last.told or last.host != socket.gethostname()) if opened else not leads:
        return
    stopped = code in STOPS or code == ExitCode.LIMIT
    name: EventName = "end" if stopped else "error"
    values: dict[str, Any] = {"code": int(code), "reason": reason}
    tell_trackers(spec, {name: values | ({"state": STOPPED} if stopped else {})})
