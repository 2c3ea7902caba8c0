"""Tokenizer step: train on a sample of the raw text that follows the mix.

The sample is a pure function of the raw manifest and the spec: each source gives its weight's share of `sample_bytes`
from evenly spaced windows of its files, or all of its text if it has less. It is taken from the first generation of the
raw text that has enough, so that the tokenizer stays the same when text is appended.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components import measuring
from components.lock import alone
from components.progress import ByteProgress
from components.sampling import sample
from components.tokenizer.taken import take
from components.volume import volume_explained
from manifests.spec import JobSpec
from trainer.data import tokenizer as bpe
from trainer.data.manifest import FileEntry, Manifest, StageResult, file_entry, write_manifest
from trainer.data.stages import open_stage, reusable
from trainer.data.vocabulary import SPECIAL_TOKENS
from trainer.files import atomic_write

REPORT = "report.json"
REPORT_BYTES = 2**20  # text of each source for the compression report


def run(job: JobSpec, raw: StageResult) -> StageResult:
    """Train the tokenizer or take that of a model (taken.py), or report that it is unchanged.

    Raises:
        SpecError: the model's tokenizer does not fit.
        DataError: raw text is missing, changed or malformed; another process trains the same tokenizer.
        VolumeError: the volume is full or cannot be written.
    """
    if job.tokenizer_from:
        return take(job)
    directory = Path(job.stage_dir("tokenizers"))
    raw_manifest = open_stage(raw)
    settings = {
        "vocab_size": job.tokenizer.vocab_size,
        "sample_bytes": job.tokenizer.sample_bytes,
        "weights": {name: source.weight for name, source in job.data.sources.items()},
        "pattern": bpe.PATTERN,
        "special_tokens": list(SPECIAL_TOKENS),
    }
    before, why = _there(directory, raw_manifest, settings)
    if before is None:
        with alone(directory, "training a tokenizer"), volume_explained(directory):
            # Check again: another process may have finished before this one got the lock.
            before, why = _there(directory, raw_manifest, settings)
            if before is None:
                print(f"tokenizer: training {job.tokenizer.vocab_size} tokens ({why})", flush=True)
                text = sampled(job, raw_manifest)
                files = _make(job, directory, raw.path, text)
                manifest = Manifest(kind="tokenizer", inputs={"raw": text.digest}, settings=settings, files=files)
                write_manifest(directory, manifest)
    if before is not None:
        manifest = before
        measuring.verified(len(manifest.files))
        print(f"tokenizer: {why}: {directory}", flush=True)
    summary = {"vocab_size": job.tokenizer.vocab_size} | json.loads((directory / REPORT).read_bytes())
    return StageResult(kind="tokenizer", path=str(directory), digest=manifest.digest, summary=summary)


def _there(directory: Path, raw: Manifest, settings: dict[str, Any]) -> tuple[Manifest | None, str]:
    """As `reusable`: a tokenizer remains valid when text is appended to its training text."""
    found = [reusable(directory, "tokenizer", {"raw": each.digest}, settings) for each in raw.generations]
    return next((one for one in found if one[0] is not None), found[-1])


def sampled(job: JobSpec, raw: Manifest) -> Manifest:
    """The first generation of the raw text that has enough for the sample; later generations are ignored."""
    wanted = {name: min(_share(job, name), raw.counts(name).text_bytes) for name in job.data.sources}
    return next(
        part for part in raw.parts if all(part.counts(name).text_bytes >= least for name, least in wanted.items())
    )


def _share(job: JobSpec, name: str) -> int:
    """Bytes of a source's text that the sample takes."""
    return int(job.data.sources[name].weight * job.tokenizer.sample_bytes)


def _make(job: JobSpec, directory: Path, raw_dir: str, raw: Manifest) -> list[FileEntry]:
    with ByteProgress("tokenizer: sampled", None) as progress:
        trained = bpe.train(_with_progress(job, raw_dir, raw, progress), job.tokenizer.vocab_size)
    bpe.save(trained, directory)
    report = _compression(directory, raw_dir, raw)
    atomic_write(directory / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    return [file_entry(directory, name, "sha256") for name in ("tokenizer.json", "tokenizer_config.json", REPORT)]


def _with_progress(job: JobSpec, directory: str, manifest: Manifest, progress: ByteProgress) -> Iterator[str]:
    for name in job.data.sources:
        for text in sample(directory, manifest, name, _share(job, name)):
            progress.advance(len(text.encode()))
            yield text


def _compression(directory: Path, raw_dir: str, manifest: Manifest) -> dict[str, float]:
    """UTF-8 bytes of text per token, by domain."""
    tokenizer = bpe.Tokenizer.load(directory)
    text_bytes: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for name, entry in manifest.sources.items():
        for text in sample(raw_dir, manifest, name, REPORT_BYTES):
            text_bytes[entry.domain] += len(text.encode())
            tokens[entry.domain] += len(tokenizer.encode(text))
    return {f"bytes_per_token_{d}": round(text_bytes[d] / tokens[d], 3) for d in sorted(tokens) if tokens[d]}
