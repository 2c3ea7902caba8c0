"""Download one source from files or the Hub into finished parts.

A source is read file by file; each file becomes one part, a large file several. Finished parts are entered in the
source's journal (writer.py) and kept. The first run records the version of a Hub branch or remote address, so that the
data of a job does not change. Local files are compared by content in each run and read again from the first change on.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from components.download import files
from components.download.readers import split_suffix
from components.download.scores import rows_of, score_of
from components.download.texts import Row, maker, unicode_text
from components.download.writer import (
    JOURNAL_NAME,
    Input,
    Journal,
    Part,
    Text,
    Texts,
    intact,
    read_journal,
    write_part,
)
from components.measuring import verified, written
from components.progress import ByteProgress
from manifests.dataspec import FilesSource, TextSpec
from trainer.data.manifest import MANIFEST_NAME
from trainer.errors import DataError, VolumeError
from trainer.preflight.measured import gibibytes

if TYPE_CHECKING:
    from trainer.data.chattemplate import ChatTemplate

UNIT_BYTES = 64 * 2**20  # plain text files are small: this much text of them goes into one part
PART_BYTES = 256 * 2**20  # text bytes of a part: the work that a crash can lose
EXPANSION = 3.0  # text bytes per compressed byte, to estimate space
MOST_MISSING = 0.5  # share of contents that may be missing
JUDGED_FROM = 1000  # contents after which the share is checked, besides at the end of each part
BLOB_EXPANSION = 40.0  # text bytes of contents per compressed byte of their ids


@dataclass(frozen=True)
class Task:
    """The download of one source: `budget` in UTF-8 bytes of text, None for everything; `folder`: base of its relative
    paths; `template`: the chat template of another model's tokenizer, which writes conversations."""

    name: str
    spec: TextSpec
    directory: Path
    budget: int | None
    folder: str | None = None
    template: ChatTemplate | None = None

    @property
    def scratch(self) -> Path:
        return self.directory / ".fetch"


def prepare(task: Task) -> Journal:
    """Fill verified parts up to the budget; returns the source's journal."""
    before = read_journal(task.directory)
    if before and task.budget is not None and not isinstance(task.spec.origin, FilesSource):
        # A shorter run keeps the parts of a longer one.
        task = replace(task, budget=max(task.budget, before.text_bytes))
    now = _listing(task, before)
    journal = now.model_copy(update={"parts": _kept(task, before, now)})
    enough = _enough(task, journal)
    if enough and before is not None and journal.parts == before.parts:
        if journal != before:
            journal.write(task.directory)  # a file was touched, but its content is the same
        _clean(task, journal)  # left by a run that was killed after its last part
        return journal
    task.directory.mkdir(parents=True, exist_ok=True)
    if before is None or before.revision != journal.revision:
        (task.directory.parent / MANIFEST_NAME).unlink(missing_ok=True)  # its list is about to change
    journal.write(task.directory)
    if journal.parts:
        print(f"download {task.name}: continues after {len(journal.parts)} finished parts", flush=True)
    if not enough:
        _check_space(task, journal)
        for part in _new_parts(task, journal, before.parts if before else []):
            journal = journal.model_copy(update={"parts": [*journal.parts, part]})
            written(task.name, part.entry.documents, part.entry.text_bytes)
            _check_missing(
                task, journal.missing, sum(part.rows for part in journal.parts)
            )  # first, so that the part is fetched again
            journal.write(task.directory)
    if not any(part.entry.documents for part in journal.parts):
        (task.directory / JOURNAL_NAME).unlink()  # else the next run would find nothing left to do
        raise DataError("holds no text; check its files and text_column")
    _clean(task, journal)
    return journal


def origin(spec: TextSpec) -> str:
    """The origin of a source for the manifest."""
    if isinstance(spec.origin, FilesSource):
        return "files: " + ", ".join(spec.origin.paths)
    config = f", config {spec.origin.config}" if spec.origin.config else ""
    return f"hub: {spec.origin.dataset}{config}, split {spec.origin.split}"


def _listing(task: Task, before: Journal | None) -> Journal:
    """The source's files to read: as recorded for remote origins, as they are now for local ones."""
    origin = task.spec.origin
    if isinstance(origin, FilesSource):
        remote = before is not None and not any(files.is_local(one) for one in before.inputs)
        if before and remote and _enough(task, before):
            return before.model_copy(update={"parts": []})
        inputs = files.list_inputs(origin, before.inputs if before else [], task.folder)
        return Journal(revision=files.revision(inputs), inputs=inputs)
    if before and _enough(task, before):
        return before.model_copy(update={"parts": []})
    from components.download import hub  # slow to import, and only sources on the Hub need it

    if before:
        now = hub.current_commit(origin)
        if now != before.revision:
            print(
                f"download {task.name}: {origin.dataset} moved: {origin.revision} is at {now}; this download continues "
                f"with {before.revision}, with which it began",
                flush=True,
            )
        return before.model_copy(update={"parts": []})
    print(f"download {task.name}: resolving {origin.dataset} at {origin.revision}", flush=True)
    commit, inputs = hub.resolve(origin)
    return Journal(revision=commit, inputs=inputs)


def _enough(task: Task, journal: Journal) -> bool:
    return journal.exhausted or (task.budget is not None and journal.text_bytes >= task.budget)


def _kept(task: Task, before: Journal | None, now: Journal) -> list[Part]:
    """The finished parts that are still valid: the longest prefix with the same inputs and intact files."""
    kept, row = list[Part](), 0
    units = iter(_units(now.inputs))
    unit = next(units, None)
    for part in before.parts if before else []:
        if unit is None or part.inputs != [files.identity(one) for one in unit] or part.first_row != row:
            break
        if not intact(task.directory, part):
            print(f"download {task.name}: {part.entry.path} is damaged; it is made again", flush=True)
            break
        verified()
        kept.append(part)
        unit, row = (next(units, None), 0) if part.whole else (unit, row + part.rows)
    return kept


def _units(inputs: list[Input]) -> list[list[Input]]:
    """The inputs of each part: one file, or adjacent plain text files up to UNIT_BYTES."""
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


def _new_parts(task: Task, journal: Journal, former: list[Part]) -> Iterator[Part]:
    """Write the parts after those of the journal, until the budget is reached or the source ends.

    Args:
        former: all former parts; one that is written again ends where it did, whatever the budget was then.
    """
    number, text_bytes = len(journal.parts), journal.text_bytes
    row = 0
    if journal.parts and not journal.parts[-1].whole:
        row = journal.parts[-1].first_row + journal.parts[-1].rows
    read = 0
    for unit in _units(journal.inputs):
        read += len(unit)
        if read <= journal.files_read:
            continue
        if task.budget is not None and text_bytes >= task.budget:
            return
        paths = [_fetched(task, journal.revision, one) for one in unit]
        left = None if task.budget is None else task.budget - text_bytes
        with _progress(task, f"file {read} of {len(journal.inputs)}", unit, left) as progress:
            identities = [files.identity(one) for one in unit]
            texts = Texts(_texts(task, zip(paths, unit, strict=True), row, progress))
            whole = False
            while not whole and (left is None or left > 0):
                limit = PART_BYTES if left is None else min(PART_BYTES, left)
                limit = min(limit, _end_of(former[number : number + 1], identities, row) or limit)
                part = write_part(task.directory, number, texts, limit, identities, row)
                for one in unit:
                    if _is_here(task, one):  # else the part's text would not match its entry
                        files.check_local(one)
                yield part
                number, row, whole = number + 1, row + part.rows, part.whole
                left = None if left is None else left - part.entry.text_bytes
                text_bytes += part.entry.text_bytes
        if not whole:
            return
        row = 0
        for path in paths:
            if path.parent == task.scratch:
                path.unlink()


def _end_of(former: list[Part], identities: list[str], row: int) -> int | None:
    """The bytes of text after which a former part of the same rows ended before the end of its files."""
    same = [part for part in former if (part.inputs, part.first_row) == (identities, row) and not part.whole]
    return same[0].entry.text_bytes if same else None


def _texts(task: Task, unit: Iterable[tuple[Path, Input]], skip: int, progress: ByteProgress) -> Iterator[Text]:
    """Text and score of each row of the unit's files from row `skip` on."""
    blobs, column = task.spec.blobs, task.spec.score_column
    advance = progress.advance if blobs is None else lambda _: None
    every = rows_of(task.spec, ((path, one.name) for path, one in unit), advance)
    chosen = islice(every, skip, None)
    if blobs is None:
        make = maker(task.spec, task.template)
        for where, row in chosen:
            made = unicode_text(make(where, row))
            yield made, score_of(where, row, column, made)
        return
    from components.download.blobs import contents

    missing, asked_for = 0, deque[tuple[str, Row]]()  # contents come in the order of the rows, of which some are ahead
    for asked, text in enumerate(contents(_noted(chosen, asked_for), blobs), start=1):
        missing += text is None
        if asked >= JUDGED_FROM:
            _check_missing(task, missing, asked)
        progress.advance(len((text or "").encode()))
        yield text, score_of(*asked_for.popleft(), column, text)


def _noted(chosen: Iterator[tuple[str, Row]], noted: deque[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    for row in chosen:
        noted.append(row)
        yield row


def _progress(task: Task, what: str, unit: list[Input], left: int | None) -> ByteProgress:
    """Progress by bytes of files read; for contents fetched by id, by bytes received."""
    total = sum(one.bytes for one in unit) if task.spec.blobs is None else left
    # Fetched files were counted during the fetch.
    source = task.name if task.spec.blobs is not None or all(_is_here(task, one) for one in unit) else None
    return ByteProgress(f"download {task.name}, {what}", total, source=source)


def _check_missing(task: Task, missing: int, asked: int) -> None:
    """Refuse a bucket that lacks most requested contents: that is more than a few gaps."""
    if missing > asked * MOST_MISSING:
        assert task.spec.blobs is not None
        raise DataError(
            f"{missing} of {asked} contents are not at {task.spec.blobs.url}, or do not match their ids; "
            "check blobs.url and text_column"
        )


def _fetched(task: Task, revision: str, one: Input) -> Path:
    """The local path of the file's content."""
    if _is_here(task, one):
        return Path(one.location)
    origin = task.spec.origin
    with ByteProgress(f"fetch {one.name}", one.bytes or None, source=task.name) as progress:
        if isinstance(origin, FilesSource):
            return files.fetch(one, task.scratch, progress.advance)
        from components.download import hub

        return hub.fetch(origin, revision, one, task.scratch, progress.advance)


def _expected_bytes(task: Task, left: list[Input], done: int) -> int:
    total = 0.0
    for one in left:
        form, compression = split_suffix(one.name)
        packed = EXPANSION if compression or form == ".parquet" else 1.0
        total += one.bytes * (packed if task.spec.blobs is None else BLOB_EXPANSION)
    return int(total) if task.budget is None else min(int(total), task.budget - done)


def _check_space(task: Task, journal: Journal) -> None:
    """Refuse if the disk is too small for the remaining text and the largest file being fetched."""
    left = journal.inputs[journal.files_read :]
    remote = [one.bytes for one in left if not _is_here(task, one)]
    need = _expected_bytes(task, left, journal.text_bytes) + max(remote, default=0)
    free = shutil.disk_usage(task.directory).free
    if need > free:
        raise VolumeError(
            f"{task.directory} has {gibibytes(free)} free, about {gibibytes(need)} are needed; make room or lower "
            "data.max_bytes_per_source"
        )


def _is_here(task: Task, one: Input) -> bool:
    return isinstance(task.spec.origin, FilesSource) and files.is_local(one)


def _clean(task: Task, journal: Journal) -> None:
    """Remove files that are not parts of the journal: parts of an earlier, longer list, temporary files, fetched
    copies."""
    names = {Path(part.entry.path).name for part in journal.parts}
    for path in task.directory.glob("part-*"):
        if path.name not in names:
            path.unlink()
    shutil.rmtree(task.scratch, ignore_errors=True)
