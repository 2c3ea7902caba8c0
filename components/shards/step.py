"""Shards step: raw text → Megatron shards, a set for each source and split, byte-identical however the work went."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from components.lock import alone
from components.shards.units import SPLITS, Unit, UnitEncoder, encode_units, load_unit, plan_units
from manifests.spec import JobSpec
from trainer.data.format import ShardWriter, token_dtype
from trainer.data.manifest import (
    MANIFEST_NAME,
    DataError,
    FileEntry,
    Manifest,
    Split,
    StageResult,
    file_entry,
    open_stage,
    reusable,
    write_manifest,
)
from trainer.data.tokenizer import Tokenizer

UNITS_DIR = "units"
ENCODING_VERSION = 1  # raise it with every change that alters the bytes; shards of another version are made again


def run(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> StageResult:
    """Make the shards, go on where a killed run stopped, or say that unchanged ones are there.

    Raises:
        DataError: raw text or tokenizer missing, changed or malformed; names file and line.
        OSError: the volume is full or a worker was killed.
    """
    directory = Path(job.stage_dir("shards"))
    raw_manifest, tokenizer_manifest = open_stage(raw), open_stage(tokenizer)
    inputs = {"raw": raw_manifest.digest, "tokenizer": tokenizer_manifest.digest}
    eod_id, vocab_size = Tokenizer.eod_id, Tokenizer.load(tokenizer.path).vocab_size
    settings = {
        "encoding_version": ENCODING_VERSION,
        "unit_bytes": job.shards.unit_bytes,
        "max_shard_bytes": job.shards.max_shard_bytes,
        "heldout_fraction": job.data.heldout_fraction,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "eod_id": eod_id,
    }
    manifest, why = reusable(directory, "shards", inputs, settings)
    if manifest is None:
        print(f"shards: encoding {len(raw_manifest.files)} files ({why})", flush=True)
        with alone(directory / UNITS_DIR, "making shards"), _full_volume_explained(directory):
            _clear(directory)
            units = plan_units(raw_manifest, job.shards.unit_bytes)
            encoder = UnitEncoder(
                raw_dir=raw.path,
                tokenizer_dir=tokenizer.path,
                out_dir=str(directory / UNITS_DIR),
                heldout_fraction=job.data.heldout_fraction,
                max_document_bytes=job.shards.max_shard_bytes,
            )
            done = encode_units(units, encoder, job.shards.workers, {"inputs": inputs, "settings": settings})
            if done:
                print(f"shards: {done} of {len(units)} units were done before", flush=True)
            files = [
                entry
                for source in raw_manifest.sources
                for split in SPLITS
                for entry in _assemble(directory, units, source, split, settings["dtype"], job.shards.max_shard_bytes)
            ]
            manifest = Manifest(
                kind="shards", inputs=inputs, settings=settings, sources=raw_manifest.sources, files=files
            )
            _check_counts(raw_manifest, manifest)
            write_manifest(directory, manifest)
    else:
        print(f"shards: {why}: {directory}", flush=True)
    # Also after a run that was killed between its manifest and this line.
    shutil.rmtree(directory / UNITS_DIR, ignore_errors=True)
    return StageResult(kind="shards", path=str(directory), digest=manifest.digest, summary=_summary(manifest))


def _assemble(
    directory: Path, units: list[Unit], source: str, split: Split, dtype: str, max_bytes: int
) -> Iterator[FileEntry]:
    """Lay the documents of the units end to end, in order, into shards of at most `max_bytes`."""
    writer: ShardWriter | None = None
    number = text_bytes = 0

    def finish(done: ShardWriter) -> Iterator[FileEntry]:
        done.close()
        counts = {"documents": done.sequences, "tokens": done.tokens, "text_bytes": text_bytes}
        yield file_entry(directory, f"{done.prefix.name}.bin", source=source, split=split, **counts)
        yield file_entry(directory, f"{done.prefix.name}.idx", source=source, split=split)

    for unit in units:
        if unit.source != source:
            continue
        documents = load_unit(directory / UNITS_DIR, unit.number, split)
        ends = np.cumsum(documents.lengths)
        first = 0
        while first < len(ends):
            if writer is None:
                writer = ShardWriter(directory / f"{source}-{split}-{number:05d}", np.dtype(dtype))
            begin = int(ends[first - 1]) if first else 0
            room = (max_bytes - writer.bytes) // writer.dtype.itemsize
            last = int(np.searchsorted(ends, begin + room, side="right"))
            if last > first:
                chosen = slice(first, last)
                writer.append(documents.tokens[begin : int(ends[last - 1])], documents.lengths[chosen])
                text_bytes += int(documents.text_bytes[chosen].sum())
            if last < len(ends):
                assert writer.sequences, "a document larger than a shard; the encoder refuses those"
                yield from finish(writer)
                writer, number, text_bytes = None, number + 1, 0
            first = last
    if writer is not None:
        yield from finish(writer)


def _check_counts(raw: Manifest, shards: Manifest) -> None:
    for source in raw.sources:
        have, want = shards.counts(source), raw.counts(source)
        if (have.documents, have.text_bytes) != (want.documents, want.text_bytes):
            raise DataError(
                f"source '{source}': encoded {have.documents} documents of {have.text_bytes} bytes, the raw manifest "
                f"says {want.documents} of {want.text_bytes}; run the download step again"
            )


def _summary(manifest: Manifest) -> dict[str, int | float | str]:
    counts = {"files": manifest.counts().files}
    for split in SPLITS:
        total = manifest.counts(split=split)
        counts |= {f"{split}_tokens": total.tokens, f"{split}_documents": total.documents}
    for source in manifest.sources:
        counts[f"{source}_tokens"] = manifest.counts(source, "train").tokens
    return counts


def _clear(directory: Path) -> None:
    """Take back the declaration that the directory is finished, then remove what an earlier run left besides units."""
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.suffix in (".bin", ".idx", ".tmp"):
            path.unlink()


@contextmanager
def _full_volume_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"{directory}: the volume is full; make room and run again, what is done stays") from None
