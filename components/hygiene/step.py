"""The hygiene step: list the documents of the raw text that training leaves out. The raw text does not change.

    hygiene/<key>/manifest.json              counts of what is left out, by raw file
    hygiene/<key>/<source>/part-00000.jsonl  one line for each document and filter (attributes.py)
    hygiene/<key>/report.json, report.md     what each filter removed of each source, with samples; report-1.json and
                                             so on after raw text was appended
    hygiene/<key>/evaluation/<name>/         the evaluation texts that were looked for

A raw file is the unit of work: the result of its scan is kept under its checksum until the end, so that a killed run
continues where it stopped and gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components import measuring
from components.hygiene.filters import INVISIBLE, Drop, Filter
from components.hygiene.report import Report
from components.lock import alone
from components.progress import ByteProgress
from components.volume import named, volume_explained
from components.workers import Workers
from manifests.spec import JobSpec
from trainer.data.jsonl import documents
from trainer.data.manifest import FileEntry, Manifest, StageResult, file_entry, write_manifest
from trainer.data.stages import open_stage, reusable, whole_part, withdraw
from trainer.files import atomic_write, sync_directory

SCANS, EVALUATION, SPILL = "scans", "evaluation", ".spill"


def run(job: JobSpec, raw: StageResult) -> StageResult:
    """Decide which documents to drop; returns `raw`, with their number by filter in the summary.

    Raises:
        DataError: raw text or evaluation texts are missing, changed or malformed.
        OSError: the volume is full or a worker was killed.
    """
    if not job.hygiene.enabled:
        print("hygiene: off in this job, nothing is left out", flush=True)
        return raw
    from components.hygiene.registry import chosen  # NumPy comes with it

    directory = Path(job.stage_dir("hygiene"))
    raw_manifest = open_stage(raw)
    with alone(directory, "deciding what training leaves out"), volume_explained(directory):
        domain_of = {name: source.domain for name, source in job.data.sources.items()}
        filters = chosen(job.hygiene, _evaluation_texts(job, directory), domain_of)
        inputs = {"raw": raw_manifest.digest}
        settings = {each.name: each.settings for each in filters}
        manifest, why = reusable(directory, "hygiene", inputs, settings)
        if manifest is None and (former := _decided_before(directory, inputs, settings)):
            # Runs have begun with it, so the decision must not change.
            print(f"hygiene: decided before invisible characters were left out; to decide again, remove {directory}")
            manifest, why = former
        if manifest is None:
            made_from = [{"raw": generation.digest} for generation in raw_manifest.generations]
            manifest = whole_part(directory, "hygiene", made_from, settings)
            decided = raw_manifest.generations[len(manifest.earlier)].files if manifest else 0
            number = len(raw_manifest.files) - decided
            print(f"hygiene: {', '.join(settings)} in {number} files ({'appended' if manifest else why})", flush=True)
            for each in filters:  # start at 0, else the first one would not show as an increase
                measuring.add("left_out_documents_total", 0, filter=each.name)
            _clear(directory, raw_manifest, manifest)
            scans = _scan(directory, raw.path, raw_manifest, filters, job.shards.workers)
            # The first of equal documents is kept, so earlier decisions hold after text is appended.
            made = len(manifest.parts) if manifest else 0
            for inputs, text in list(zip(made_from, raw_manifest.parts, strict=True))[made:]:
                report = Report(raw.path, text, settings)
                files = list(_decide(directory, text, manifest, filters, scans[: len(text.files)], report))
                files += report.write(directory, len(text.earlier))
                new = Manifest(kind="hygiene", inputs=inputs, settings=settings, files=files)
                manifest = manifest.grown(inputs, files) if manifest else new
            assert manifest is not None
            write_manifest(directory, manifest)
        else:
            measuring.verified(len(manifest.files))
            print(f"hygiene: {why}: {directory}", flush=True)
        shutil.rmtree(directory / SCANS, ignore_errors=True)  # also after a kill between manifest and here
    counts = manifest.counts()
    print(f"hygiene: leaves out {counts.documents} documents, {counts.text_bytes} bytes of text", flush=True)
    left_out = {"left_out_documents": counts.documents, "left_out_text_bytes": counts.text_bytes}
    return raw.model_copy(update={"summary": raw.summary | left_out})


def _decided_before(
    directory: Path, inputs: dict[str, str], settings: dict[str, dict[str, Any]]
) -> tuple[Manifest, str] | None:
    """A complete result of a version that compared texts with invisible characters, and why it is still used."""
    before = {name: {k: v for k, v in of.items() if k not in INVISIBLE} for name, of in settings.items()}
    manifest, why = reusable(directory, "hygiene", inputs, before)
    return (manifest, why) if manifest else None


def _evaluation_texts(job: JobSpec, directory: Path) -> dict[str, list[str]]:
    from components.download.source import Task, prepare  # with what it reads files by

    found = {}
    for name, spec in job.hygiene.evaluation.items():
        task = Task(name, spec, directory / EVALUATION / name, None, job.storage.sources_dir)
        with named(f"hygiene.evaluation.{name}"):
            journal = prepare(task)
        paths = [task.directory.parent / part.entry.path for part in journal.parts]
        found[name] = [text for path in paths for _, text in documents(path)]
    return found


@dataclass(frozen=True)
class _ScanFile:
    """Scans one raw file with all filters in one pass; sent to the worker processes."""

    raw_dir: str
    filters: list[Filter]

    def __call__(self, item: tuple[FileEntry, Path]) -> None:
        import numpy as np

        entry, folder = item
        scanners = {each.name: each.scanner() for each in self.filters}
        for number, (offset, text) in enumerate(documents(Path(self.raw_dir) / entry.path)):
            for scanner in scanners.values():
                scanner.see(number, offset, text)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, scanner in scanners.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                # Through a stream: if NumPy opens the file itself, its error does not say why a write failed.
                np.save(SimpleNamespace(write=file.write), scanner.result())
                file.flush()
                os.fsync(file.fileno())
        os.rename(temporary, folder)
        sync_directory(folder.parent)


def _scan(directory: Path, raw_dir: str, raw: Manifest, filters: list[Filter], workers: int) -> list[Path]:
    """The folder with each raw file's scans, in the manifest's order; only missing scans are made."""
    settings = Manifest(kind="hygiene", settings={each.name: each.settings for each in filters}, files=[]).digest[:16]
    folders = [directory / SCANS / f"{entry.checksum}-{settings}" for entry in raw.files]
    pending = dict[Path, FileEntry]()  # files of the same content are scanned once
    for entry, folder in zip(raw.files, folders, strict=True):
        if not folder.exists():
            pending.setdefault(folder, entry)
    total, left = (sum(entry.bytes for entry in some) for some in (raw.files, pending.values()))
    if left < total:
        print(f"hygiene: {len(raw.files) - len(pending)} of {len(raw.files)} files were scanned before", flush=True)
    items = [(entry, folder) for folder, entry in pending.items()]
    with Workers(workers) as pool, ByteProgress("hygiene: scanned", total, total - left) as progress:
        for (entry, _), _ in pool.run(_ScanFile(raw_dir, filters), items):
            progress.advance(entry.bytes)
    return folders


def _decide(
    directory: Path,
    raw: Manifest,
    before: Manifest | None,
    filters: list[Filter],
    scans: Sequence[Path],
    report: Report,
) -> Iterator[FileEntry]:
    """Write the filters' decisions for each raw file; they pass through files because there may be many.

    Args:
        before: the decisions about the files from before others were appended; they are kept.
    """
    decided = {entry.path for entry in before.files} if before else set()
    paths = [entry.path for entry in raw.files]
    spills = [directory / (entry.path + SPILL) for entry in raw.files]
    for spill in spills:
        spill.parent.mkdir(parents=True, exist_ok=True)
        spill.write_bytes(b"")
    for each in filters:
        for drops in each.decide([folder / f"{each.name}.npy" for folder in scans], paths):
            by_file = dict[int, list[Drop]]()
            for drop in drops:
                by_file.setdefault(drop.file, []).append(drop)
            for number, some in by_file.items():
                with open(spills[number], "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(_row(each.name, drop), ensure_ascii=False) + "\n" for drop in some)
    for entry, spill in zip(raw.files, spills, strict=True):
        rows = [json.loads(line) for line in spill.read_bytes().splitlines()]
        rows.sort(key=lambda row: row["document"])  # a stable sort keeps the order of a document's filters
        report.add(entry, rows)
        if entry.path in decided:
            spill.unlink()
            continue
        sizes = {row["document"]: row.pop("bytes") for row in rows}
        for name, count in Counter(row["filter"] for row in rows).items():
            measuring.add("left_out_documents_total", count, filter=name)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(directory / entry.path, lines.encode())
        spill.unlink()
        counts = {"documents": len(sizes), "text_bytes": sum(sizes.values())}
        yield file_entry(directory, entry.path, source=entry.source, **counts)


def _row(name: str, drop: Drop) -> dict[str, Any]:
    return {"document": drop.document, "offset": drop.offset, "filter": name, "bytes": drop.bytes} | drop.evidence


def _clear(directory: Path, raw: Manifest, stays: Manifest | None) -> None:
    """Remove the manifest, which declares the directory finished, and the decisions of an earlier run."""
    withdraw(directory, stays)
    for name in {Path(entry.path).parts[0] for entry in raw.files} if stays is None else ():
        shutil.rmtree(directory / name, ignore_errors=True)
