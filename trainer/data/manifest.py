"""Manifests: the content and provenance of a data directory, and the checksums to verify it.

A stage of the data path (raw text, tokenizer, shards) is a directory with files and one `manifest.json`, which is
written last: a directory without it is unfinished. The manifest has no time, host or absolute path, so equal inputs
give an equal digest. A longer run appends files: existing files and their order stay, and the manifest keeps the digest
of each earlier generation, by which runs and later stages made from it find it. Layout of the stages, below the
datasets directory:

    raw/<key>/manifest.json                  kind raw: `files` carry source, documents and text_bytes (UTF-8 bytes of
                                             the texts)
    raw/<key>/<source>/part-00000.jsonl      JSON lines, UTF-8, "\\n" after each, not compressed so that byte ranges can
                                             be units of work: {"text": "..."}, a line a document, other fields ignored
    hygiene/<key>/<source>/part-00000.jsonl  kind hygiene: a line for each document that is left out, with the evidence
    tokenizers/<key>/tokenizer.json, …       kind tokenizer
    shards/<key>/<source>-<split>-00000.bin  kind shards: Megatron pairs of .bin and .idx, split train or heldout; .bin
    shards/<key>/<source>-<split>-00000.idx  entries carry source, split, documents, text_bytes and tokens; beside them
                                             .docs (provenance.py); .answers for training on answers only,
                                             .scores (scores.py) for an order by a score
    models/<key>/config.json, …              kind model: files of a model on the Hub, under their names there

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trainer.errors import DataError
from trainer.fields import Stored, tell_unknown
from trainer.files import Algorithm, atomic_write, checksum, unreadable

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
Kind = Literal["raw", "hygiene", "tokenizer", "shards", "model"]
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Stored):
    """One file, relative to the manifest's directory, with the counts of its documents (0 if not applicable)."""

    path: str
    bytes: int = Field(ge=0)
    algorithm: Algorithm
    checksum: str
    source: str | None = None
    split: Split | None = None
    documents: int = Field(default=0, ge=0)
    text_bytes: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"path '{path}' leaves the manifest's directory")
        return path


class SourceEntry(Stored):
    """Provenance of one source; `revision`: the resolved origin, a commit id or a digest of local files."""

    domain: str
    licence: str
    origin: str
    revision: str


class Counts(Record):
    files: int
    documents: int
    text_bytes: int
    tokens: int


class Generation(Stored):
    """An earlier state of a grown directory: its first `files` files, made from `inputs`, with manifest digest
    `digest`."""

    digest: str
    inputs: dict[str, str]
    files: int = Field(ge=0)


class Manifest(Stored):
    """`inputs`: digests of the inputs; `settings`: the parameters of the stage.

    `earlier`: the generations before this one, oldest first.
    """

    kind: Kind
    format_version: Literal[1] = 1
    inputs: dict[str, str] = {}
    settings: dict[str, Any] = {}
    sources: dict[str, SourceEntry] = {}
    files: list[FileEntry]
    earlier: list[Generation] = []

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        text = json.dumps(self.stored(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def stored(self) -> dict[str, Any]:
        """As JSON values; a directory that never grew has no field for generations, as in the first version."""
        return self.model_dump(mode="json", exclude=None if self.earlier else {"earlier"})

    @property
    def generations(self) -> list[Generation]:
        """All generations, oldest first, this one last."""
        return [*self.earlier, Generation(digest=self.digest, inputs=self.inputs, files=len(self.files))]

    def grown(self, inputs: dict[str, str], files: list[FileEntry]) -> Manifest:
        """The next generation, with more files after the existing ones."""
        return self.model_copy(
            update={"inputs": inputs, "files": [*self.files, *files], "earlier": self.generations},
        )

    @property
    def parts(self) -> list[Manifest]:
        """The manifest as it was in each of `generations`, this one last."""
        former = [
            {"inputs": generation.inputs, "files": self.files[: generation.files], "earlier": self.earlier[:number]}
            for number, generation in enumerate(self.earlier)
        ]
        return [*(self.model_copy(update=fields) for fields in former), self]

    def at(self, digest: str) -> Manifest | None:
        """The generation with this digest; None if there is none."""
        digests = (generation.digest for generation in self.generations)
        return next((part for known, part in zip(digests, self.parts, strict=True) if known == digest), None)

    def select(self, source: str | None = None, split: Split | None = None) -> list[FileEntry]:
        """The files of one source and split (None: of any), in the manifest's order."""
        return [f for f in self.files if source in (None, f.source) and split in (None, f.split)]

    def counts(self, source: str | None = None, split: Split | None = None) -> Counts:
        """Sums over the files of `select`."""
        files = self.select(source, split)
        return Counts(
            files=len(files),
            documents=sum(f.documents for f in files),
            text_bytes=sum(f.text_bytes for f in files),
            tokens=sum(f.tokens for f in files),
        )


class StageResult(Stored):
    """The result that a finished step passes to the next one: place and digest of its output, and counts for people."""

    kind: str
    path: str
    digest: str
    summary: dict[str, int | float | str] = {}

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> StageResult:
        """Raises DataError if `text` was not written by `to_json`."""
        try:
            result = cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"the result of the step before cannot be read ({first_problem(error)})") from None
        tell_unknown(result, f"the result of the step before, of {result.path}")
        return result


def file_entry(directory: str | Path, path: str, algorithm: Algorithm = "xxh3_128", **counts: Any) -> FileEntry:
    """The entry of a finished file `directory/path`; `counts` sets further fields of FileEntry."""
    full = Path(directory) / path
    size = full.stat().st_size
    return FileEntry(path=path, bytes=size, algorithm=algorithm, checksum=checksum(full, algorithm), **counts)


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write `manifest.json`, including its own digest. Call it last: it declares the directory finished."""
    value = {"digest": manifest.digest} | manifest.stored()
    atomic_write(Path(directory) / MANIFEST_NAME, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_manifest(directory: str | Path, kind: Kind | None = None) -> Manifest:
    """The manifest of a finished directory.

    Raises:
        DataError: it is missing, was changed after it was written, or has another kind than `kind`.
        UnreadableError: it exists but cannot be read.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        value = json.loads(path.read_bytes())
        written = value.pop("digest")
        if isinstance(version := value.get("format_version"), int) and version > FORMAT_VERSION:
            raise DataError(
                f"{path}: written by a later yaongi (format {version}, this one reads {FORMAT_VERSION}); use that "
                "version or a newer one"
            )
        manifest = Manifest.model_validate(value)
    except FileNotFoundError:
        raise DataError(f"{path}: not there; run the step that makes this directory") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValidationError as error:
        raise DataError(f"{path}: not a manifest ({first_problem(error)}); remove it and run its step again") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{path}: not a manifest; remove it and run its step again") from None
    if written != manifest.digest:
        raise DataError(f"{path}: changed after it was written (digest differs); remove it and run its step again")
    if kind is not None and manifest.kind != kind:
        raise DataError(f"{path}: holds {manifest.kind}, expected {kind}; give the directory of the {kind} stage")
    tell_unknown(manifest, str(path))
    return manifest


def verify(
    directory: str | Path,
    manifest: Manifest,
    *,
    files: Iterable[FileEntry] | None = None,
    sizes_only: bool = False,
    threads: int = 4,
) -> None:
    """Check that the files (default: all of the manifest) exist and are unchanged.

    Raises:
        DataError: names the first file that is not.
        UnreadableError: one exists but cannot be read.
    """
    chosen = list(manifest.files if files is None else files)
    for entry in chosen:
        _check(Path(directory) / entry.path, entry, _check_size)
    if sizes_only:
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda entry: _check(Path(directory) / entry.path, entry, _check_content), chosen))


def _check(path: Path, entry: FileEntry, check: Callable[[Path, FileEntry], None]) -> None:
    try:
        check(path, entry)
    except OSError as error:
        raise unreadable(path, error) from None


def _check_size(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing; run the step that makes it again")
    if (size := path.stat().st_size) != entry.bytes:
        raise DataError(f"{path}: has {size} bytes, the manifest says {entry.bytes}; run its step again")


def _check_content(path: Path, entry: FileEntry) -> None:
    if checksum(path, entry.algorithm) != entry.checksum:
        raise DataError(f"{path}: its content differs from the manifest's {entry.algorithm}; run its step again")


def first_problem(error: ValidationError) -> str:
    """Path and message of the first validation error."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}"
