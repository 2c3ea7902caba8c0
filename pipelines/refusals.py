"""The checks for which `yaongi run` refuses a job on this machine before it does anything. All commands that start a
job here make them, and `doctor` reports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.plan import feasible
from manifests.spec import JobSpec
from pipelines.ports import refuse_taken
from trainer.recording.trackers.keys import problems


def checks(job: JobSpec, changes: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """The checks by name; each raises a ForeseenError that says why the job cannot run here.

    Args:
        changes: the fields that the user wrote (`pipelines.ports.written`).
    """
    return {
        "ports": lambda: refuse_taken(job, changes),
        "benchmarks": lambda: _refuse_benchmarks(job),
        **feasible.checks(job, train=True),
    }


def refuse(job: JobSpec, changes: dict[str, Any]) -> None:
    """Raise the error of the first failing check; return if none fails."""
    for check in checks(job, changes).values():
        check()


def remarks(job: JobSpec) -> list[str]:
    """What a run here would do otherwise than the job says, a line each: a run is not refused for it."""
    return list(problems(job.train.trackers))


def _refuse_benchmarks(job: JobSpec) -> None:
    if job.train.evaluate.has_benchmarks:
        from trainer.evaluation.refused import refuse as refuse_benchmarks

        refuse_benchmarks(job.train_spec().evaluate)
