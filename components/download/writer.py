"""The output of a source: parts of JSON lines and a journal, so that a killed download keeps its finished parts.

A part holds texts of one input file (of several small ones for plain text); a large file becomes several parts. A part
is written under a temporary name, fsynced and renamed, then entered in the journal; parts not in the journal are
written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import xxhash
from pydantic import Field, ValidationError

from trainer.data.manifest import FileEntry, Record
from trainer.files import atomic_write, checksum, sync_directory

JOURNAL_NAME = "journal.json"


class Input(Record):
    """One file of a source; `name` is its name in messages.

    `checksum` identifies its content (None for a remote address, whose content is unknown before it is read). `stamp`
    identifies its version: size and times of a local file, which save hashing it again, or the ETag of a remote one.
    """

    name: str
    location: str
    bytes: int
    checksum: str | None = None
    stamp: str | None = None


class Part(Record):
    """A finished part: `rows` rows of its inputs from `first_row` on.

    `inputs`: checksums of its files; `whole`: whether it reaches their end; `missing`: number of rows whose content was
    not available.
    """

    entry: FileEntry
    inputs: list[str]
    first_row: int
    rows: int
    missing: int
    whole: bool


class Journal(Record):
    revision: str
    inputs: list[Input]
    parts: list[Part] = Field(default=[])

    @property
    def text_bytes(self) -> int:
        return sum(part.entry.text_bytes for part in self.parts)

    @property
    def missing(self) -> int:
        return sum(part.missing for part in self.parts)

    @property
    def exhausted(self) -> bool:
        """Whether the parts hold the whole source."""
        return self.files_read == len(self.inputs)

    @property
    def files_read(self) -> int:
        return sum(len(part.inputs) for part in self.parts if part.whole)

    def write(self, directory: Path) -> None:
        atomic_write(directory / JOURNAL_NAME, _sealed(self.model_dump_json(indent=1).encode()))


def read_journal(directory: Path) -> Journal | None:
    """The journal of a source's directory; None without one that is usable and byte-identical to what was written.

    Manifests and later runs rely on its counts, rows and revisions, which the parts' checksums do not cover.
    """
    try:
        data = (directory / JOURNAL_NAME).read_bytes()
    except FileNotFoundError:
        return None
    content = b"{" + data[len(_sealed(b"{")) :]
    try:
        if _sealed(content) == data:
            return Journal.model_validate_json(content)
    except ValidationError:
        pass
    print(
        f"download {directory.name}: {JOURNAL_NAME} is damaged or of another version; the source is read again",
        flush=True,
    )
    return None


def _sealed(content: bytes) -> bytes:
    """A JSON object with the digest of its bytes in front. Bytes are hashed because it is rewritten with every part."""
    return b'{"digest": "' + hashlib.sha256(content).hexdigest().encode() + b'",' + content[1:]


def intact(directory: Path, part: Part) -> bool:
    """Whether the part's file exists with the content recorded in the journal."""
    path = directory.parent / part.entry.path
    if not path.is_file() or path.stat().st_size != part.entry.bytes:
        return False
    return checksum(path, part.entry.algorithm) == part.entry.checksum


Text = tuple[str | None, float | None]  # of a row, None for a missing content; and its score, if it has one


class Texts:
    """An iterator over texts that knows whether it has ended."""

    def __init__(self, texts: Iterator[Text]) -> None:
        self._texts, self._next = texts, list[Text]()

    def __iter__(self) -> Iterator[Text]:
        while not self.ended:
            yield self._next.pop()

    @property
    def ended(self) -> bool:
        if not self._next:
            self._next.extend(islice(self._texts, 1))
        return not self._next


def write_part(directory: Path, number: int, texts: Texts, limit: int, inputs: list[str], first_row: int) -> Part:
    """Write texts to `part-<number>.jsonl` until they end or reach `limit` UTF-8 bytes; blank texts are skipped.

    Raises:
        OSError: the file cannot be written; no partial file is left.
    """
    path = directory / f"part-{number:05d}.jsonl"
    temporary = path.with_name(path.name + ".tmp")
    digest, size, documents, text_bytes, rows, missing = xxhash.xxh3_128(), 0, 0, 0, 0, 0
    try:
        with open(temporary, "wb") as file:
            for text, score in texts:
                rows += 1
                missing += text is None
                if text and not text.isspace():
                    fields = {"text": text} | ({} if score is None else {"score": score})
                    line = (json.dumps(fields, ensure_ascii=False) + "\n").encode()
                    file.write(line)
                    digest.update(line)
                    size += len(line)
                    documents += 1
                    text_bytes += len(text.encode())
                    if text_bytes >= limit:
                        break
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # even on Ctrl-C no partial file stays
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    entry = FileEntry(
        path=f"{directory.name}/{path.name}",  # relative to the parent directory, as in the manifest
        bytes=size,
        algorithm="xxh3_128",
        checksum=digest.hexdigest(),
        source=directory.name,
        documents=documents,
        text_bytes=text_bytes,
    )
    return Part(entry=entry, inputs=inputs, first_row=first_row, rows=rows, missing=missing, whole=texts.ended)
