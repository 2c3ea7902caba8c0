"""The download step: every source's documents as JSON lines on the datasets volume, described by one manifest.

A run that finds everything unchanged writes nothing; one that finds finished parts continues after them (source.py).
"""

from __future__ import annotations

from pathlib import Path

from components.download.source import Task, origin, prepare
from components.download.writer import Journal
from components.lock import alone
from manifests.dataspec import SourceSpec
from manifests.spec import JobSpec
from trainer.data.manifest import (
    MANIFEST_NAME,
    DataError,
    FileEntry,
    Manifest,
    SourceEntry,
    StageResult,
    read_manifest,
    write_manifest,
)
from trainer.errors import ForeseenError, VolumeError, of_the_machine


def run(job: JobSpec) -> StageResult:
    """Bring the raw text of all sources to `job.stage_dir("raw")`.

    Raises:
        DataError, VolumeError: a source cannot be had, read or stored; one line: source, file, remedy. Finished parts
            stay.
    """
    root = Path(job.stage_dir("raw"))
    with alone(root, "downloading"):
        journals = {name: _source(job, name, spec) for name, spec in job.data.sources.items()}
        manifest = describe(job, journals)
        unchanged = (root / MANIFEST_NAME).exists() and _digest_of(root) == manifest.digest
        if not unchanged:
            write_manifest(root, manifest)
    counts = manifest.counts()
    state = "unchanged and verified, nothing to do" if unchanged else "done"
    print(f"download: {state}: {counts.documents} documents, {counts.text_bytes} bytes of text", flush=True)
    summary: dict[str, int | float | str] = {"documents": counts.documents, "text_bytes": counts.text_bytes}
    summary |= {f"{name}_text_bytes": manifest.counts(name).text_bytes for name in journals}
    for name, journal in journals.items():
        if journal.missing:
            rows = sum(part.rows for part in journal.parts)
            print(f"download {name}: {journal.missing} of {rows} contents are missing or damaged, left out", flush=True)
            summary[f"{name}_missing"] = journal.missing
    return StageResult(kind="raw", path=str(root), digest=manifest.digest, summary=summary)


def describe(job: JobSpec, journals: dict[str, Journal]) -> Manifest:
    sources, entries = dict[str, SourceEntry](), list[FileEntry]()
    for name, journal in journals.items():
        spec = job.data.sources[name]
        sources[name] = SourceEntry(
            domain=spec.domain, licence=spec.licence, origin=origin(spec), revision=journal.revision
        )
        entries += [part.entry for part in journal.parts if part.entry.documents]
    inputs = {name: journal.revision for name, journal in journals.items()}
    return Manifest(kind="raw", inputs=inputs, settings={"key": job.raw_key}, sources=sources, files=entries)


def _source(job: JobSpec, name: str, spec: SourceSpec) -> Journal:
    task = Task(name, spec, Path(job.stage_dir("raw")) / name, job.byte_budget(name), job.storage.sources_dir)
    try:
        return prepare(task)
    except DataError as error:
        raise DataError(f"source '{name}': {error}") from None
    except OSError as error:
        raise _system_error(task, error) from None


def _digest_of(root: Path) -> str | None:
    try:
        return read_manifest(root, "raw").digest
    except DataError:
        return None


def _system_error(task: Task, error: OSError) -> ForeseenError:
    if (known := of_the_machine(error, task.directory)) is not None:
        return VolumeError(f"source '{task.name}': {known}")
    where = error.filename or task.directory
    return DataError(f"source '{task.name}': {where}: {error.strerror or error}; check the path and its permissions")
