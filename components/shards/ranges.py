"""The ranges into which encoding is divided; the step that makes them does not import the encoder."""

from __future__ import annotations

from manifests.spec import JobSpec
from trainer.data.manifest import Record, StageResult


class Range(Record):
    """Part `index` of `count` of the units to encode. It is self-contained, because a loop passes nothing else."""

    job: JobSpec
    raw: StageResult
    tokenizer: StageResult
    index: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.index + 1}/{self.count}"


def ranges(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> list[Range]:
    """The ranges, one for each encoder pod of the job."""
    pods = job.shards.pods
    return [Range(job=job, raw=raw, tokenizer=tokenizer, index=index, count=pods) for index in range(pods)]
