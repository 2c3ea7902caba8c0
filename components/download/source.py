"""One source on its way from files or the Hub to finished parts.

A source is read file by file; each file becomes a part, entered in the source's journal (writer.py), and finished parts
are kept. What a Hub branch or a remote address held is recorded with the first run and not asked for again: the data of
a job does not change under it. Local files are compared by content each time; from the first that changed on they are
read again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from components.download import files
from components.download.readers import split_suffix, texts
from components.download.writer import Input, Journal, Part, intact, read_journal, write_part
from components.progress import ByteProgress
from manifests.dataspec import FilesSource, SourceSpec
from trainer.data.manifest import MANIFEST_NAME, DataError

UNIT_BYTES = 64 * 2**20  # plain text files are small: this much of them goes into one part
EXPANSION = 3.0  # text bytes out of one compressed byte, to estimate space


@dataclass(frozen=True)
class Task:
    """One source on its way: `budget` in UTF-8 bytes of text, None for everything."""

    name: str
    spec: SourceSpec
    directory: Path
    budget: int | None

    @property
    def scratch(self) -> Path:
        return self.directory / ".fetch"


def prepare(task: Task) -> Journal:
    """The source's journal after everything that the budget asks for is in verified parts."""
    before = read_journal(task.directory)
    now = _listing(task, before)
    journal = now.model_copy(update={"parts": _kept(task, before, now)})
    units = _units(now.inputs)[len(journal.parts) :]
    enough = _enough(task, journal)
    if enough and before is not None and journal.parts == before.parts:
        if journal != before:
            journal.write(task.directory)  # a file was touched, its content is the same
        return journal
    task.directory.mkdir(parents=True, exist_ok=True)
    (task.directory.parent / MANIFEST_NAME).unlink(missing_ok=True)  # until all is done again the stage is unfinished
    journal.write(task.directory)
    if journal.parts:
        print(f"download {task.name}: continues after {len(journal.parts)} finished parts", flush=True)
    if not enough:
        _check_space(task, units, journal.text_bytes)
        for unit in units:
            if task.budget is not None and journal.text_bytes >= task.budget:
                break
            journal = journal.model_copy(update={"parts": [*journal.parts, _make_part(task, journal, unit)]})
            journal.write(task.directory)
    if not any(part.entry.documents for part in journal.parts):
        raise DataError("holds no text; check its files and text_column")
    _clean(task, journal)
    return journal


def origin(spec: SourceSpec) -> str:
    """What the manifest says about where a source comes from."""
    if isinstance(spec.origin, FilesSource):
        return "files: " + ", ".join(spec.origin.paths)
    config = f", config {spec.origin.config}" if spec.origin.config else ""
    return f"hub: {spec.origin.dataset}{config}, split {spec.origin.split}"


def _listing(task: Task, before: Journal | None) -> Journal:
    """The source's files as they are to be read: as recorded for remote origins, as they are now for local ones."""
    origin = task.spec.origin
    if isinstance(origin, FilesSource):
        remote = before is not None and not any(files.is_local(one) for one in before.inputs)
        if before and remote and _enough(task, before):
            return before.model_copy(update={"parts": []})
        inputs = files.list_inputs(origin, before.inputs if before else [])
        return Journal(revision=files.revision(inputs), inputs=inputs)
    if before:
        return before.model_copy(update={"parts": []})
    from components.download import hub  # slow to import, and only sources on the Hub need it

    print(f"download {task.name}: resolving {origin.dataset} at {origin.revision}", flush=True)
    commit, inputs = hub.resolve(origin)
    return Journal(revision=commit, inputs=inputs)


def _enough(task: Task, journal: Journal) -> bool:
    return journal.exhausted or (task.budget is not None and journal.text_bytes >= task.budget)


def _kept(task: Task, before: Journal | None, now: Journal) -> list[Part]:
    """The finished parts that still hold: the longest run from the first on with the same inputs and an intact file."""
    kept = list[Part]()
    text_bytes = 0
    for part, unit in zip(before.parts if before else [], _units(now.inputs), strict=False):
        reached = task.budget is not None and text_bytes + part.entry.text_bytes >= task.budget
        if part.inputs != [_identity(one) for one in unit] or not (part.whole or reached):
            break
        if not intact(task.directory, part):
            print(f"download {task.name}: {part.entry.path} is damaged; it is made again", flush=True)
            break
        kept.append(part)
        text_bytes += part.entry.text_bytes
    return kept


def _identity(one: Input) -> str:
    return one.checksum or f"{one.name} {one.bytes}"


def _units(inputs: list[Input]) -> list[list[Input]]:
    """What becomes one part each: a file, or neighbouring plain text files up to UNIT_BYTES."""
    units = list[list[Input]]()
    room = 0
    for one in inputs:
        small = split_suffix(one.name)[0] == ".txt" and one.bytes <= room
        if small:
            units[-1].append(one)
            room -= one.bytes
        else:
            units.append([one])
            room = UNIT_BYTES - one.bytes if split_suffix(one.name)[0] == ".txt" else 0
    return units


def _make_part(task: Task, journal: Journal, unit: list[Input]) -> Part:
    read = sum(len(part.inputs) for part in journal.parts)
    label = f"download {task.name}, file {read + 1} of {len(journal.inputs)}"
    budget = None if task.budget is None else task.budget - journal.text_bytes
    paths = [_fetched(task, journal.revision, one) for one in unit]
    with ByteProgress(label, sum(one.bytes for one in unit)) as progress:
        column = task.spec.text_column
        content = [texts(path, one.name, column, progress.advance) for path, one in zip(paths, unit, strict=True)]
        entry, whole = write_part(task.directory, len(journal.parts), chain.from_iterable(content), budget)
    for path in paths:
        if path.parent == task.scratch:
            path.unlink()
    return Part(entry=entry, inputs=[_identity(one) for one in unit], whole=whole)


def _fetched(task: Task, revision: str, one: Input) -> Path:
    """Where the file's content is on this machine."""
    if _is_here(task, one):
        return Path(one.location)
    origin = task.spec.origin
    with ByteProgress(f"fetch {one.name}", one.bytes or None) as progress:
        if isinstance(origin, FilesSource):
            return files.fetch(one, task.scratch, progress.advance)
        from components.download import hub

        return hub.fetch(origin.dataset, revision, one, task.scratch, progress.advance)


def _expected_bytes(task: Task, units: list[list[Input]], done: int) -> int:
    total = 0.0
    for one in chain.from_iterable(units):
        form, compression = split_suffix(one.name)
        total += one.bytes * (EXPANSION if compression or form == ".parquet" else 1.0)
    return int(total) if task.budget is None else min(int(total), task.budget - done)


def _check_space(task: Task, units: list[list[Input]], done: int) -> None:
    """Refuse to start what cannot end: the text still to come and the largest file on its way must fit."""
    remote = [one.bytes for one in chain.from_iterable(units) if not _is_here(task, one)]
    need = _expected_bytes(task, units, done) + max(remote, default=0)
    free = shutil.disk_usage(task.directory).free
    if need > free:
        raise DataError(
            f"{task.directory}: about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "make room or lower data.max_bytes_per_source"
        )


def _is_here(task: Task, one: Input) -> bool:
    return isinstance(task.spec.origin, FilesSource) and files.is_local(one)


def _clean(task: Task, journal: Journal) -> None:
    """Remove what no part of the journal is: parts of an earlier, longer list, temporary files, fetched copies."""
    names = {Path(part.entry.path).name for part in journal.parts}
    for path in task.directory.glob("part-*"):
        if path.name not in names:
            path.unlink()
    shutil.rmtree(task.scratch, ignore_errors=True)
