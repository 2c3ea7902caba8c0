"""Benchmarks that cannot be run, refused before anything else is done. Imports no torch."""

from __future__ import annotations

from trainer.benchmarkspec import BenchmarksSpec
from trainer.evaluation import logickor, tasks


def refuse(spec: BenchmarksSpec) -> None:
    """Return if the benchmarks can begin on this machine. Whether their data can be fetched is seen later.

    Raises:
        SpecError, DataError, LaunchError: as `tasks.refuse_unknown` and `logickor.refuse`.
    """
    tasks.refuse_unknown(spec)
    if spec.judge is not None:
        logickor.refuse(spec.judge)
