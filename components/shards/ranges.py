"""How the encoding is shared out: a step before it says the ranges, and needs nothing of what encodes."""

from __future__ import annotations

from manifests.spec import JobSpec
from trainer.data.manifest import Record, StageResult


class Range(Record):
    """A part of the units to encode: number `index` of `count`. It says all, as a loop hands on nothing else."""

    job: JobSpec
    raw: StageResult
    tokenizer: StageResult
    index: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.index + 1}/{self.count}"


def ranges(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> list[Range]:
    """The ranges for as many pods as the job says."""
    pods = job.shards.pods
    return [Range(job=job, raw=raw, tokenizer=tokenizer, index=index, count=pods) for index in range(pods)]
