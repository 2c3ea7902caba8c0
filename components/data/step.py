"""The data steps, one after the other in one process: from the sources to the token files.

Each is announced as a step of its own. Where several pods encode, this ends with the tokenizer and the ranges for the
loop over `encode`, whose results `shards` puts together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from components.download.step import run as download
from components.hygiene.step import run as hygiene
from components.plan.enough import DATA_ALONE_VARIABLE, text_suffices, tokens_suffice
from components.plan.length import continued
from components.plan.step import runnable_here
from components.shards.ranges import Range, ranges
from components.shards.step import run as shards
from components.tokenizer.step import run as tokenizer
from manifests.spec import JobSpec
from trainer.data.manifest import StageResult

Announced = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Prepared:
    """`result` of the last step that ran; `parts` are still to be encoded."""

    result: StageResult
    parts: list[Range] = field(default_factory=list)


def begun(job: JobSpec) -> JobSpec:
    """The job as the run on the volumes that it continues, or as a new one.

    Raises:
        SpecError, CheckpointError: as `runnable_here` and `continued`.
    """
    job = continued(runnable_here(job))
    print(f"run {job.run_name}: {job.train.steps} steps of {job.train.batch.tokens_per_step} tokens", flush=True)
    return job


def is_shared_out(job: JobSpec) -> bool:
    """Whether several pods encode."""
    return job.shards.pods > 1


def _unannounced(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def run(job: JobSpec, announced: Announced = _unannounced, *, to_share_out: bool = False) -> Prepared:
    """Fetch, check and encode the text of a job, or report that it is unchanged.

    The environment variable of `prepare --until` ends it after the step that it names.

    Args:
        announced: the context in which a step of a name runs, such as `components.running.step`.
        to_share_out: leave the encoding to the pods of a pipeline if the job wants several.

    Raises:
        SpecError, DataError, LaunchError, VolumeError: as the steps.
    """
    until = os.environ.get(DATA_ALONE_VARIABLE, "")
    with announced("download"):
        raw = download(job)
        text_suffices(job, raw)
    if until == "download":
        return Prepared(raw)
    with announced("hygiene"):
        raw = hygiene(job, raw)
    if until == "hygiene":
        return Prepared(raw)
    with announced("tokenizer"):
        trained = tokenizer(job, raw)
        parts = ranges(job, raw, trained) if to_share_out and is_shared_out(job) else []
    if parts or until == "tokenizer":
        return Prepared(trained, parts)
    with announced("shards"):
        tokens = shards(job, raw, trained)
        tokens_suffice(job, tokens)
    return Prepared(tokens)
