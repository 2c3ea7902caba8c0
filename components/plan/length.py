"""Change the length of a run: find the run and the checkpoint from which it continues."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manifests.spec import JobSpec, load_job
from trainer.checkpoints.checkpoint import candidates, step_of
from trainer.checkpoints.length import continuable
from trainer.errors import SpecError


def as_begun_with(job: JobSpec, steps: int) -> JobSpec:
    """The job as a run that began with another number of steps."""
    return job.updated({"train": {"begun_with_steps": None if steps == job.train.steps else steps}})


def continued(job: JobSpec) -> JobSpec:
    """The job as a continuation of an existing run that differs only in length, if there is one.

    Of several such runs, the one with the most steps done. A run whose learning rate has begun to fall and that has no
    checkpoint from before cannot be lengthened: one line says so, and the job begins a new run.

    Raises:
        CheckpointError: a run's checkpoints are damaged.
    """
    if job.train.begun_with_steps or Path(job.run_dir).is_dir():
        return job
    furthest, found = 0, job
    for longer, now in _shorter(job):
        existing = candidates(longer.run_dir)
        try:
            first = continuable(existing, longer.train_spec())
        except SpecError as error:
            print(f"train.steps: a new run: {error}", flush=True)
            continue
        step = step_of(first[0]) if first else 0
        if step > furthest:
            furthest, found = step, longer
            if now < job.train.steps:
                print(f"run {longer.run_name} of {now} steps becomes {job.train.steps} steps long: from step {step} on")
    return found


def _shorter(job: JobSpec) -> Iterator[tuple[JobSpec, int]]:
    """Yield the job as each existing run that differs only in length, and that run's length."""
    for file in sorted(Path(job.run_dir).parent.glob(f"{job.name}-*/job.yaml")):
        try:
            there = load_job(str(file))
        except SpecError:
            continue  # of another version, or damaged: cannot be continued
        longer = as_begun_with(job, there.begun_with_steps)
        if longer.run_name == file.parent.name and there.train.steps <= job.train.steps:
            yield longer, there.train.steps


def changed(job: JobSpec, changes: dict[str, Any], run: str) -> JobSpec:
    """The job of `run` with changes to fields that may change during a run, mainly its length.

    Raises:
        SpecError: as `parse`; the changes make another run; no checkpoint allows this length.
    """
    now = as_begun_with(job.updated(changes), job.begun_with_steps)
    limit = job.data.first_max_bytes
    now = now.updated({"data": {"begun_with_max_bytes": None if limit == now.data.max_bytes_per_source else limit}})
    if now.run_name != run:
        raise SpecError(
            f"--set: this makes another run, {now.run_name}; a run that has begun can change only train.steps, "
            "train.skip, train.parallel, train.runtime, train.evaluate, train.export and data.max_bytes_per_source; "
            "for anything else: yaongi run JOB --set …"
        )
    existing = candidates(now.run_dir)
    first = continuable(existing, now.train_spec())
    if now.train.steps != job.train.steps:
        where = f"from step {int(first[0].name.removeprefix('step-'))} on" if first else "from its start"
        print(f"run {run} of {job.train.steps} steps becomes {now.train.steps} steps long: {where}", flush=True)
        if first[:1] != existing[:1]:
            print(
                f"{existing[0].name} and what else is newer was trained on a falling learning rate; its checkpoints go "
                "with the first one that is saved, its export stays until the longer run's",
                flush=True,
            )
    return now
