"""The metrics ports of a run on this machine: a named one that is taken is refused before anything long is done."""

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
    """Why nothing can be served on a port now, None where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            return "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    return None


def written(preset_or_file: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that a person has written, in a job file or by --set; a preset and a stored job are no person's."""
    preset = preset_or_file in preset_names()
    fields = {} if preset or is_stored(preset_or_file) else changes_of(preset_or_file)[1]
    return deep_merge(fields, changes)


def refuse_taken(job: JobSpec, changes: dict[str, Any]) -> None:
    """Return if every port that a person has named is free. The default ones give way when their time comes.

    Args:
        changes: what is `written`, where even the default port is a named one.

    Raises:
        SpecError
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
