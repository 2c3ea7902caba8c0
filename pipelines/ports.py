"""The metrics ports of a run on this machine: refuse a port that the user chose and that is taken, before long work."""

from __future__ import annotations

import errno
import socket
from typing import Any

from components.measuring import PORT_VARIABLE, named_port
from manifests.spec import JobSpec, changes_of, preset_names
from trainer.errors import SpecError
from trainer.specbase import deep_merge, is_stored
from trainer.thismachine import DEFAULT_PORT


def problem(port: int) -> str | None:
    """Why a port cannot be bound now; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            return "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    return None


def written(preset_or_file: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that the user wrote, in a job file or by --set; not those of a preset or a stored job."""
    preset = preset_or_file in preset_names()
    fields = {} if preset or is_stored(preset_or_file) else changes_of(preset_or_file)[1]
    return deep_merge(fields, changes)


def refuse_taken(job: JobSpec, changes: dict[str, Any]) -> None:
    """Return if every port that the user chose is free. A default port that is taken is replaced later.

    Args:
        changes: the fields from `written`; if they hold the default port, it counts as chosen.

    Raises:
        SpecError: a chosen port is taken.
    """
    first, ranks = job.train.runtime.metrics_port, job.cluster.world_size
    runtime = (changes.get("train") or {}).get("runtime") or {}
    if first and (first != DEFAULT_PORT or "metrics_port" in runtime):
        for port in range(first, first + ranks):
            if what := problem(port):
                raise SpecError(
                    f"train.runtime.metrics_port {first}: port {port} {what} (each rank needs one); name "
                    "others, 0 for no metrics, or leave it out to get free ones"
                )
    if (named := named_port()) and (what := problem(named)):
        raise SpecError(f"{PORT_VARIABLE} {named}: the port {what}; name another, or unset it to get a free one")
