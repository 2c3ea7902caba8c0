"""What a source has become so far: parts of JSON lines and a journal, so that a killed download keeps what is finished.

One part holds the texts of one input file (of several small ones for plain text). A part is written under a temporary
name, synced and renamed, then entered in the journal; a part that the journal does not know is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash
from pydantic import Field, ValidationError

from trainer.data.manifest import FileEntry, Record, atomic_write, checksum, sync_directory

JOURNAL_NAME = "journal.json"


class Input(Record):
    """One file of a source, which messages call `name`.

    `checksum` proves its content (None for a remote address, whose content is not known before it is read); `stamp`
    spares hashing a local file whose size and times are as before.
    """

    name: str
    location: str
    bytes: int
    checksum: str | None = None
    stamp: str | None = None


class Part(Record):
    """A finished part; `inputs` are the checksums of the files in it, `whole` is False when the byte budget cut it."""

    entry: FileEntry
    inputs: list[str]
    whole: bool


class Journal(Record):
    revision: str
    inputs: list[Input]
    parts: list[Part] = Field(default=[])

    @property
    def text_bytes(self) -> int:
        return sum(part.entry.text_bytes for part in self.parts)

    @property
    def exhausted(self) -> bool:
        """Whether everything that the source holds is in the parts."""
        read = sum(len(part.inputs) for part in self.parts)
        return read == len(self.inputs) and all(part.whole for part in self.parts)

    def write(self, directory: Path) -> None:
        atomic_write(directory / JOURNAL_NAME, self.model_dump_json(indent=1).encode())


def read_journal(directory: Path) -> Journal | None:
    """The journal of a source's directory; None where there is none that can be used."""
    try:
        return Journal.model_validate_json((directory / JOURNAL_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def intact(directory: Path, part: Part) -> bool:
    """Whether the part's file is there with the content that the journal says."""
    path = directory.parent / part.entry.path
    if not path.is_file() or path.stat().st_size != part.entry.bytes:
        return False
    return checksum(path, part.entry.algorithm) == part.entry.checksum


def write_part(directory: Path, number: int, texts: Iterator[str], budget: int | None) -> tuple[FileEntry, bool]:
    """Write texts to `part-<number>.jsonl` until they end or reach `budget` bytes; (entry, whether they ended).

    The entry's path is relative to the directory above, as the manifest wants it.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    path = directory / f"part-{number:05d}.jsonl"
    temporary = path.with_name(path.name + ".tmp")
    digest, size, documents, text_bytes, ended = xxhash.xxh3_128(), 0, 0, 0, True
    try:
        with open(temporary, "wb") as file:
            for text in texts:
                if budget is not None and text_bytes >= budget:
                    ended = False
                    break
                line = (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode()
                file.write(line)
                digest.update(line)
                size += len(line)
                documents += 1
                text_bytes += len(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also on Ctrl-C: no half-written file stays
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    entry = FileEntry(
        path=f"{directory.name}/{path.name}",
        bytes=size,
        algorithm="xxh3_128",
        checksum=digest.hexdigest(),
        source=directory.name,
        documents=documents,
        text_bytes=text_bytes,
    )
    return entry, ended
