"""Report as early as possible that the sources are too small for a run's tokens within their epoch caps.

The trainer refuses such a run too, but only after it has built its model on every node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from manifests.spec import JobSpec
from trainer.data.enough import Amount, end_of, refuse_too_little, stages_of
from trainer.data.format import Shard
from trainer.data.manifest import Manifest, StageResult, read_manifest
from trainer.data.mixture import Mixture
from trainer.errors import DataError

DATA_ALONE_VARIABLE = "YAONGI_DATA_ALONE"  # set if no training follows: then too little text is only reported


def text_suffices(job: JobSpec, raw: StageResult) -> None:
    """Refuse too little text for any tokenizer: at most one token per byte, plus one at the end of each document.

    Raises:
        DataError: as `refuse_too_little`.
    """
    manifest = read_manifest(raw.path, "raw")
    counts = {name: manifest.counts(name) for name in job.data.sources}
    most = {name: Amount(one.text_bytes + one.documents, 1, " (a token for each byte)") for name, one in counts.items()}
    _check(job, most)


def tokens_suffice(job: JobSpec, shards: StageResult) -> None:
    """Refuse shards with too few tokens; the trainer makes the same check before its first step.

    Raises:
        DataError: as `refuse_too_little`.
    """
    manifest = read_manifest(shards.path, "shards")
    _check(job, {name: _amount(Path(shards.path), manifest, name) for name in job.data.sources})


def _amount(directory: Path, manifest: Manifest, source: str) -> Amount:
    entries = [entry for entry in manifest.select(source, "train") if entry.path.endswith(".bin")]
    longest = (Shard(directory / entry.path.removesuffix(".bin")).lengths.max(initial=1) for entry in entries)
    return Amount(manifest.counts(source, "train").tokens, int(max(longest, default=1)))


def _check(job: JobSpec, amounts: Mapping[str, Amount]) -> None:
    train = job.train_spec()
    mix, curriculum, skip = train.tokens.mix, train.tokens.curriculum, train.tokens.skip
    try:
        end = end_of(0, train.steps * train.batch.tokens_per_step, skip)
        refuse_too_little(Mixture(list(mix), stages_of(mix, curriculum)), mix, amounts, end)
    except DataError as error:
        if not os.environ.get(DATA_ALONE_VARIABLE):
            raise
        print(f"too little for train.steps {train.steps:,}: {error}", flush=True)
