"""What `yaongi run` refuses a job for on this machine before it does anything: asked by all who start a job here, and
told by `doctor` beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.plan import feasible
from manifests.spec import JobSpec
from pipelines.ports import refuse_taken


def checks(job: JobSpec, changes: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """What is looked at, by name; each raises a ForeseenError that says why the job cannot run here.

    Args:
        changes: the fields that a person has written (`pipelines.ports.written`).
    """
    return {"ports": lambda: refuse_taken(job, changes), **feasible.checks(job, train=True)}


def refuse(job: JobSpec, changes: dict[str, Any]) -> None:
    """Raise what the first of `checks` raises that refuses the job; return if none does."""
    for check in checks(job, changes).values():
        check()
