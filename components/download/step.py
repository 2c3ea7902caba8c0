"""The download step: write every source's documents as JSON lines on the datasets volume, with one manifest.

If everything is unchanged, a run writes nothing; if there are finished parts, it continues after them (source.py). A
longer run needs more text: parts are appended, and the manifest's next generation lists them last.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from components.download.source import Task, origin, prepare
from components.download.writer import Journal
from components.lock import alone
from components.volume import named
from manifests.dataspec import SourceSpec
from manifests.spec import JobSpec
from trainer.data.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    SourceEntry,
    StageResult,
    read_manifest,
    write_manifest,
)
from trainer.errors import DataError, VolumeError, in_words, of_the_machine

if TYPE_CHECKING:
    from trainer.data.chattemplate import ChatTemplate


def run(job: JobSpec) -> StageResult:
    """Download the models that the job names, and the raw text of all sources to `job.stage_dir("raw")`.

    Raises:
        SpecError: a model does not fit the job.
        DataError, LaunchError, VolumeError: a source cannot be read, fetched or stored; one line: source, file, remedy.
            Finished parts are kept.
    """
    if job.models:
        from components.download.models import fetch_models  # imports the Hub's library, which most jobs do not need

        fetch_models(job)
    template = _template(job)
    root = Path(job.stage_dir("raw"))
    with alone(root, "downloading"):
        _found_by_later_versions(job)
        before = _before(root)
        if before and before.settings.get("chat_template") != (template.digest if template else None):
            raise DataError(
                f"{root}: its conversations were written with another chat template than the model has now; remove "
                "this folder, so that they are written again"
            )
        journals = {name: _source(job, name, spec, template) for name, spec in job.data.sources.items()}
        manifest = describe(job, journals, before, template)
        unchanged = before is not None and (root / MANIFEST_NAME).exists() and before.digest == manifest.digest
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


def describe(
    job: JobSpec, journals: dict[str, Journal], before: Manifest | None, template: ChatTemplate | None = None
) -> Manifest:
    """The manifest for the journals: the previous one, its next generation, or a new one."""
    sources, entries = dict[str, SourceEntry](), list[FileEntry]()
    for name, journal in journals.items():
        spec = job.data.sources[name]
        sources[name] = SourceEntry(
            domain=spec.domain, licence=spec.licence, origin=origin(spec), revision=journal.revision
        )
        entries += [part.entry for part in journal.parts if part.entry.documents]
    inputs = {name: journal.revision for name, journal in journals.items()}
    if before is not None and (before.inputs, before.sources) == (inputs, sources):
        known = {entry.path: entry for entry in before.files}
        if known.items() <= {entry.path: entry for entry in entries}.items():
            more = [entry for entry in entries if entry.path not in known]
            return before.grown(inputs, more) if more else before
    settings = {"key": job.raw_key} | ({"chat_template": template.digest} if template else {})
    return Manifest(kind="raw", inputs=inputs, settings=settings, sources=sources, files=entries)


def _template(job: JobSpec) -> ChatTemplate | None:
    if not job.models:
        return None
    from components.pretrained import conversations

    return conversations(job)


def _source(job: JobSpec, name: str, spec: SourceSpec, template: ChatTemplate | None) -> Journal:
    directory = Path(job.stage_dir("raw")) / name
    task = Task(name, spec, directory, job.byte_budget(name), job.storage.sources_dir, template)
    with named(f"source '{name}'"):
        try:
            return prepare(task)
        except OSError as error:
            where = error.filename or task.directory
            other = VolumeError(f"{where}: {error.strerror or in_words(error)}; check the path and its permissions")
            raise of_the_machine(error, task.directory) or other from None


def _before(root: Path) -> Manifest | None:
    try:
        return read_manifest(root, "raw")
    except DataError:
        return None


def _found_by_later_versions(job: JobSpec) -> None:
    """Make data that version 0.1 began available under today's keys too, for longer jobs and rendered manifests."""
    for stage, key in job.keys.items():
        former, link = Path(job.stage_dir(stage)), Path(job.storage.datasets_dir) / stage / key
        if former != link and not link.exists() and not link.is_symlink():
            former.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # the volume has no symlinks: then only this job finds the data
                link.symlink_to(former.name)
