"""Shards step: raw text → Megatron shards, one set per source and split, byte-identical however the work was divided.

The work can be distributed: `encode_range` encodes a part of the units, on any number of machines; `run` encodes the
remaining units (all, if none were distributed) and makes the shards and their manifest.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components import measuring
from components.hygiene.attributes import decisions
from components.lock import alone_on
from components.progress import ByteProgress
from components.sampling import sample
from components.shards.assemble import ShardMaker, ShardPlan, plan_shards
from components.shards.engine import choose_engine
from components.shards.ranges import Range
from components.shards.units import Journal, Unit, UnitEncoder, encode_units, plan_units, range_of
from components.volume import volume_explained
from components.workers import Workers
from manifests.spec import JobSpec
from trainer.data import answers, scores
from trainer.data.format import token_dtype
from trainer.data.manifest import SPLITS, FileEntry, Manifest, StageResult, read_manifest, verify, write_manifest
from trainer.data.provenance import SUFFIX
from trainer.data.stages import open_stage, reusable, whole_part, withdraw
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

UNITS_DIR = "units"
ENCODING_VERSION = 2  # increase it with every change of the bytes; shards of another version are made again
PARITY_BYTES = 2**19  # text of the data on which the engines are compared


def run(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> StageResult:
    """Make the shards, continue after a killed run, or report that they are unchanged.

    Raises:
        DataError: raw text or tokenizer is missing, changed or malformed; names file and line.
        OSError: the volume is full or a worker was killed.
    """
    work = _Work.of(job, raw, tokenizer)
    before, why = work.reusable()
    if before is None:
        work = work.begun()
        units = work.units()
        with _ready(job, work, units) as workers:
            before, why = work.reusable()  # check again: another process may have finished before this one got the lock
            if before is None:
                files = len({unit.path for unit in units})
                reason = "appended" if work.whole else why
                print(f"shards: {files} files to make token files of ({reason})", flush=True)
                manifest = _make(job, work, units, workers)
    if before is not None:
        manifest = before
        measuring.verified(len(manifest.files))
        print(f"shards: {why}: {work.directory}", flush=True)
    # Also after a run that was killed between the manifest and this line.
    shutil.rmtree(work.directory / UNITS_DIR, ignore_errors=True)
    return StageResult(kind="shards", path=str(work.directory), digest=manifest.digest, summary=_summary(manifest))


def encode_range(one: Range) -> None:
    """Encode the units of a range, from which `run` makes shards, unless the shards exist.

    Raises:
        DataError, OSError: as `run`.
    """
    work = _Work.of(one.job, one.raw, one.tokenizer)
    if work.finished():
        print(f"shards: made before: {work.directory}", flush=True)
        return
    work = work.begun(sizes_only=True)
    units = range_of(work.units(), one.index, one.count)
    if units:
        with _ready(one.job, work, units) as workers:
            if not work.finished():  # by another process, before this one got the lock
                _encode(one.job, work, units, workers)


@dataclass(frozen=True)
class _Work:
    """The inputs and settings of shards.

    Each generation of the raw text gives one generation of the shards. `whole`: the newest intact one that exists.
    """

    directory: Path
    raw: Manifest
    raw_dir: str
    hygiene: Manifest | None
    tokenizer_dir: str
    made_from: list[dict[str, str]]
    settings: dict[str, Any]
    whole: Manifest | None = None

    @property
    def inputs(self) -> dict[str, str]:
        return self.made_from[-1]

    @classmethod
    def of(cls, job: JobSpec, raw: StageResult, tokenizer: StageResult) -> _Work:
        raw_manifest, tokenizer_manifest = open_stage(raw), open_stage(tokenizer)
        verify(tokenizer.path, tokenizer_manifest)  # one changed byte would change every token
        hygiene = decisions(job, raw_manifest)
        made_from = [{"raw": each.digest, "tokenizer": tokenizer_manifest.digest} for each in raw_manifest.generations]
        if hygiene:
            decided = {each.inputs["raw"]: {"hygiene": each.digest} for each in hygiene.generations}
            made_from = [inputs | decided[inputs["raw"]] for inputs in made_from]
        loaded = Tokenizer.load(tokenizer.path)
        answer_sources = sorted(name for name, source in job.data.sources.items() if source.loss == "answers")
        return cls(
            directory=Path(job.stage_dir("shards")),
            raw=raw_manifest,
            raw_dir=raw.path,
            hygiene=hygiene,
            tokenizer_dir=tokenizer.path,
            made_from=made_from,
            settings={
                "encoding_version": ENCODING_VERSION,
                "unit_bytes": job.shards.unit_bytes,
                "max_shard_bytes": job.shards.max_shard_bytes,
                "heldout_fraction": job.data.heldout_fraction,
                "vocab_size": loaded.vocab_size,
                "dtype": token_dtype(loaded.vocab_size).name,
                "eod_id": loaded.eod_id,
                "markup": sorted(name for name, source in job.data.sources.items() if source.has_markup),
            }
            | ({"answers": answer_sources} if answer_sources else {})
            | ({"scored": scored} if (scored := job.data.scored) else {})
            | ({"score_columns": columns} if (columns := job.data.score_columns) else {}),
        )

    def begun(self, *, sizes_only: bool = False) -> _Work:
        """The same with `whole` set, which requires reading the shards."""
        whole = whole_part(self.directory, "shards", self.made_from, self.settings, sizes_only=sizes_only)
        return replace(self, whole=whole)

    def units(self, generation: int | None = None) -> list[Unit]:
        """The units of the raw files that a generation added; by default of all files without intact shards."""
        made = len(self.whole.generations) if self.whole else 0
        first, last = (made, len(self.made_from)) if generation is None else (generation, generation + 1)
        ends = [0, *(each.files for each in self.raw.generations)]
        chosen = {entry.path for entry in self.raw.files[ends[first] : ends[last]]}
        return [unit for unit in plan_units(self.raw, self.settings["unit_bytes"]) if unit.path in chosen]

    def reusable(self) -> tuple[Manifest | None, str]:
        """The manifest of existing intact shards with the same inputs and settings, else None; and the reason."""
        return reusable(self.directory, "shards", self.inputs, self.settings)

    def finished(self) -> bool:
        """Whether the shards exist, judged only by manifest and file sizes."""
        try:
            manifest = read_manifest(self.directory, "shards")
            verify(self.directory, manifest, sizes_only=True)
        except DataError:
            return False
        made_from = [generation.inputs for generation in manifest.generations]
        return self.inputs in made_from and manifest.settings == self.settings


def _make(job: JobSpec, work: _Work, units: Sequence[Unit], workers: Workers) -> Manifest:
    _clear(work)
    _encode(job, work, units, workers)
    manifest = work.whole
    for number in range(len(manifest.generations) if manifest else 0, len(work.made_from)):
        inputs = work.made_from[number]
        files = _assembled(job, work, work.units(number), manifest, workers)
        fields: dict[str, Any] = {"inputs": inputs, "settings": work.settings, "sources": work.raw.sources}
        manifest = manifest.grown(inputs, files) if manifest else Manifest(kind="shards", files=files, **fields)
    assert manifest is not None
    _check_counts(work.raw, work.hygiene, manifest)
    write_manifest(work.directory, manifest)
    return manifest


def _encode(job: JobSpec, work: _Work, units: Sequence[Unit], workers: Workers) -> None:
    units_dir = work.directory / UNITS_DIR
    journal = Journal(units_dir, {"inputs": work.inputs, "settings": work.settings}, units)
    if journal.checksums:
        print(f"shards: {len(journal.checksums)} of {len(units)} units were done before", flush=True)
    if len(journal.checksums) == len(units):
        return
    each = PARITY_BYTES // max(len(work.raw.sources), 1)
    texts = (text for source in work.raw.sources for text in sample(work.raw_dir, work.raw, source, each))
    engine, why = choose_engine(Tokenizer.load(work.tokenizer_dir), texts)
    print(f"shards: encoding with {engine} ({why})", flush=True)
    encoder = UnitEncoder(
        raw_dir=work.raw_dir,
        hygiene_dir=job.stage_dir("hygiene") if work.hygiene else None,
        markup=frozenset(work.settings["markup"]),
        tokenizer_dir=work.tokenizer_dir,
        out_dir=str(units_dir),
        heldout_fraction=job.data.heldout_fraction,
        max_document_bytes=job.shards.max_shard_bytes,
        engine=engine,
        answers=frozenset(work.settings.get("answers", [])),
        scored=frozenset(work.settings.get("scored", [])),
        rated=frozenset(work.settings.get("score_columns", {})),
    )
    encode_units(units, encoder, workers, journal)


def _assembled(
    job: JobSpec, work: _Work, units: Sequence[Unit], before: Manifest | None, workers: Workers
) -> list[FileEntry]:
    """Make shards of these units, numbered after those of `before`."""
    units_dir = work.directory / UNITS_DIR
    vocab_size = work.settings["vocab_size"]
    present = [entry for entry in before.files if entry.tokens] if before else []
    numbers = Counter((entry.source or "", entry.split) for entry in present if entry.split)
    most = job.shards.max_shard_bytes // token_dtype(vocab_size).itemsize
    plans = list(plan_shards(units_dir, units, most, numbers))
    maker = ShardMaker(str(work.directory), str(units_dir), vocab_size)
    made: dict[str, list[FileEntry]] = {}
    with ByteProgress("shards: written", None) as progress:
        for plan, entries in workers.run(maker, plans):
            made[plan.name] = entries
            progress.advance(sum(entry.bytes for entry in entries))
            _count(plan, entries)
    return [entry for plan in plans for entry in made[plan.name]]


def _count(plan: ShardPlan, entries: list[FileEntry]) -> None:
    for entry in entries:
        measuring.written(plan.source, entry.documents, entry.text_bytes)
        measuring.add("shard_tokens_total", entry.tokens, source=plan.source, split=plan.split)


def _check_counts(raw: Manifest, hygiene: Manifest | None, shards: Manifest) -> None:
    for source in raw.sources:
        have, want = shards.counts(source), raw.counts(source)
        documents, text_bytes = want.documents, want.text_bytes
        if hygiene is not None:
            left_out = hygiene.counts(source)
            documents, text_bytes = documents - left_out.documents, text_bytes - left_out.text_bytes
        if (have.documents, have.text_bytes) != (documents, text_bytes):
            raise DataError(
                f"source '{source}': encoded {have.documents} documents of {have.text_bytes} bytes, by the manifests "
                f"of raw text and hygiene it has {documents} of {text_bytes}; run the download step again"
            )


def _summary(manifest: Manifest) -> dict[str, int | float | str]:
    counts: dict[str, int | float | str] = {"files": manifest.counts().files}
    for split in SPLITS:
        total = manifest.counts(split=split)
        counts |= {f"{split}_tokens": total.tokens, f"{split}_documents": total.documents}
    for source in manifest.sources:
        counts[f"{source}_tokens"] = manifest.counts(source, "train").tokens
    return counts


def _clear(work: _Work) -> None:
    """Remove the manifest, which declares the directory finished, then all files except units and intact shards."""
    withdraw(work.directory, work.whole)
    stays = {entry.path for entry in work.whole.files} if work.whole else set()
    for path in work.directory.iterdir():
        if (
            path.name not in stays
            and path.suffix in (".bin", ".idx", SUFFIX, answers.SUFFIX, scores.SUFFIX, ".tmp")
            and path.is_file()
        ):
            path.unlink()


@contextmanager
def _ready(job: JobSpec, work: _Work, units: Sequence[Unit]) -> Iterator[Workers]:
    """The worker processes, while this process holds the lock on the units."""
    first = units[0].number if units else 0
    with (
        alone_on(work.directory / UNITS_DIR, "making shards", first, len(units)),
        volume_explained(work.directory),
        Workers(job.shards.workers) as workers,
    ):
        yield workers
