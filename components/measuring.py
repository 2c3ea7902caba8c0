"""The metrics of a running pipeline step: one registry per process, served from a thread.

Ranks use the ports from 9400 up; steps use one below, so that under kfp.local, where everything runs on one machine, a
step does not take a rank's port. If the port is taken, a step uses the next free one. A port that the user chose is
never replaced: of several concurrent steps, only the first has it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from components.marks import MOVED
from manifests.names import STEP_METRICS_PORT, Task
from trainer.errors import SpecError
from trainer.recording.exporter import Metrics
from trainer.recording.metrics import Process

PORT_VARIABLE = "YAONGI_METRICS_PORT"  # 0 serves nothing

_metrics = Metrics(rank=0, port=0, process="data")  # for library calls outside a step: counted, never served
_stage = ""


@contextmanager
def served(stage: str) -> Iterator[None]:
    """Serve this process's metrics during the block, as step `stage` of the pipeline.

    At its end it waits for the next scrape if there have been some, so that Prometheus gets the last values. If a
    chosen port is taken, the step only runs without metrics; a local run has already checked it at its start.

    Raises:
        SpecError: YAONGI_METRICS_PORT is not a port.
    """
    global _metrics, _stage
    process: Process = "launcher" if stage in get_args(Task) else "data"
    before, port = (_metrics, _stage), named_port()
    first = STEP_METRICS_PORT if port is None else port
    try:
        _metrics = Metrics(rank=0, port=first, stride=int(port is None), process=process)
    except SpecError:
        print(f"{stage}: serves no metrics, as port {first} is taken or not allowed ({PORT_VARIABLE})", flush=True)
        _metrics = Metrics(rank=0, port=0, process=process)
    if port is None and _metrics.port not in (0, STEP_METRICS_PORT):
        print(f"{MOVED}{_metrics.port}, as {STEP_METRICS_PORT} is taken", flush=True)
    _stage = stage
    beat()
    try:
        yield
        _metrics.await_scrape()
    finally:
        _metrics.close()
        _metrics, _stage = before


def add(name: str, amount: float = 1, **labels: str) -> None:
    """Raise a counter of the table."""
    _metrics.add(name, amount, **labels)


def set_gauge(name: str, value: float, **labels: str) -> None:
    _metrics.set(name, value, **labels)


def beat() -> None:
    """Update the heartbeat: the step has made progress."""
    if _stage:
        _metrics.set("stage_heartbeat_timestamp_seconds", time.time(), stage=_stage)


def worked_through(num_bytes: int, source: str | None = None) -> None:
    """Count processed bytes as progress, also as input of `source` if given."""
    if _stage:
        _metrics.add("stage_bytes_total", num_bytes, stage=_stage)
    if source:
        _metrics.add("download_bytes_total", num_bytes, source=source)
    beat()


def verified(num_files: int = 1) -> None:
    """Count files of an earlier run that verified."""
    if _stage:
        _metrics.add("files_verified_total", num_files, stage=_stage)


def written(source: str, documents: int, text_bytes: int) -> None:
    """Count documents written for a source."""
    if _stage:
        _metrics.add("documents_total", documents, stage=_stage, source=source)
        _metrics.add("text_bytes_total", text_bytes, stage=_stage, source=source)


def named_port() -> int | None:
    """The port set in the environment; None if not set.

    Raises:
        SpecError: it is not a port.
    """
    text = os.environ.get(PORT_VARIABLE)
    if text is None:
        return None
    if not text.isdigit() or int(text) > 65535:
        raise SpecError(f"{PORT_VARIABLE} is {text!r}; give a port number, or 0 for no metrics of the pipeline's steps")
    return int(text)
