"""Units of tokenization: byte ranges of raw files, encoded by a process pool; finished units survive crashes.

A unit's bounds depend only on the raw files and `unit_bytes`. A worker writes a unit's tokens to a temporary file,
fsyncs and renames it; then the parent appends its checksum to a journal. After a crash, units in the journal are kept
and the others are encoded again, so the result depends neither on crashes nor on the number of workers. Several
processes, also on different machines, may encode disjoint ranges of units: each has its own journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.hygiene.attributes import dropped
from components.progress import ByteProgress
from components.shards.engine import Encode, EngineName, open_engine, with_markup
from components.workers import Workers
from trainer.data.answers import Ranges
from trainer.data.chat import NO_ANSWER, AnswerFinder
from trainer.data.chattemplate import form_of
from trainer.data.format import token_dtype
from trainer.data.jsonl import objects, where
from trainer.data.manifest import SPLITS, Manifest, Split
from trainer.data.scores import Scores, compression, number
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.files import atomic_write, checksum, sync_directory

BATCH_CHARACTERS = 2**19  # text encoded at once; bounds a worker's memory
_HASH_RANGE = 2**64


@dataclass(frozen=True)
class Unit:
    """Lines of `path` (relative to the raw directory) that start in bytes [start, stop)."""

    number: int
    source: str
    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of a unit and split: concatenated tokens; for each document, its tokens, text bytes and line offset.

    `scores`: of each document of a source that is ordered by one, else None.
    `answers`: the concatenated token ranges of the answers (trainer/data/chat.py), and `answer_counts` their number in
    each document; None for a source whose loss is on all tokens.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    answer_counts: NDArray[np.int64] | None = None
    answers: Ranges | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class UnitEncoder:
    """Encodes one unit; sent to the worker processes. A unit's bytes depend only on this object and the unit.

    Documents dropped by `hygiene_dir` are left out. Special tokens are encoded as such only in the sources of `markup`,
    and answers are looked for only in the sources of `answers`. Those of `scored` get scores: of `rated` from the field
    `score` of the raw lines, of others by compression.
    """

    raw_dir: str
    hygiene_dir: str | None
    markup: frozenset[str]
    tokenizer_dir: str
    out_dir: str
    heldout_fraction: float
    max_document_bytes: int
    engine: EngineName
    answers: frozenset[str] = frozenset()
    scored: frozenset[str] = frozenset()
    rated: frozenset[str] = frozenset()

    def __call__(self, unit: Unit) -> str:
        """Write the unit's file and return its checksum.

        Raises:
            DataError: a line is malformed, a document is too large for a shard, or it has no answer although its
                source trains on answers only, or no score; the message names file and line.
        """
        tokenizer, encode = _opened(self.tokenizer_dir, self.engine)
        if unit.source in self.markup:
            encode = with_markup(encode, tokenizer)
        find_answers = _answer_finder(self.tokenizer_dir, self.engine) if unit.source in self.answers else None
        dtype = token_dtype(tokenizer.vocab_size)
        parts: dict[Split, list[EncodedDocuments]] = {split: [] for split in SPLITS}
        path = Path(self.raw_dir) / unit.path
        left_out = dropped(self.hygiene_dir, unit.path)
        lines = (line for line in objects(path, unit.start, unit.stop) if line[0] not in left_out)
        for offsets, objects_here in _batches(lines):
            texts = [each["text"] for each in objects_here]
            ids = [tokenizer.document(document) for document in encode(texts)]
            answers = list[list[tuple[int, int]]]() if find_answers else None
            for offset, document in zip(offsets, ids, strict=True):
                if find_answers and answers is not None:
                    answers.append(find_answers(document))
                    if not answers[-1]:
                        raise DataError(f"{where(path, offset)}: {NO_ANSWER}")
                if len(document) * dtype.itemsize > self.max_document_bytes:
                    raise DataError(
                        f"{where(path, offset)}: a document of {len(document)} tokens is larger than a shard; "
                        "raise shards.max_shard_bytes or cut the document"
                    )
            data = [text.encode() for text in texts]
            if unit.source in self.rated:
                scores = [_score(path, *each) for each in zip(offsets, objects_here, strict=True)]
            else:
                scores = [compression(one) for one in data] if unit.source in self.scored else []
            heldout = [is_heldout(one, self.heldout_fraction) for one in data]
            for split in SPLITS:
                chosen = [n for n, held in enumerate(heldout) if held == (split == "heldout")]
                sizes, places = [len(data[n]) for n in chosen], [offsets[n] for n in chosen]
                found = None if answers is None else [answers[n] for n in chosen]
                part = _pack([ids[n] for n in chosen], sizes, places, dtype, found)
                if unit.source in self.scored:
                    part = replace(part, scores=np.array([scores[n] for n in chosen], np.float32))
                parts[split].append(part)
        target = unit_file(self.out_dir, unit.number)
        _save(
            target,
            {
                split: _joined(parts[split], dtype, find_answers is not None, unit.source in self.scored)
                for split in SPLITS
            },
        )
        return checksum(target, "xxh3_128")


def is_heldout(text: bytes, fraction: float) -> bool:
    """Decide by the text's hash: equal texts get the same split, wherever they are."""
    return xxhash.xxh3_64_intdigest(text) < fraction * _HASH_RANGE


def plan_units(manifest: Manifest, unit_bytes: int) -> list[Unit]:
    """The units of all raw files, in the manifest's order."""
    ranges = [
        (entry, start, min(start + unit_bytes, entry.bytes))
        for entry in manifest.files
        for start in range(0, entry.bytes, unit_bytes)
    ]
    return [Unit(n, entry.source or "", entry.path, start, stop) for n, (entry, start, stop) in enumerate(ranges)]


def range_of(units: Sequence[Unit], index: int, count: int) -> Sequence[Unit]:
    """The units of range `index` of `count`; the ranges partition all units, with byte counts as equal as units
    allow."""
    total = sum(unit.stop - unit.start for unit in units)
    ends = np.cumsum([unit.stop - unit.start for unit in units])
    first, last = (int(np.searchsorted(ends, total * n / count, side="right")) for n in (index, index + 1))
    return units[first:last]


def encode_units(units: Sequence[Unit], encoder: UnitEncoder, workers: Workers, journal: Journal) -> None:
    """Encode the units that are not in the journal, and enter them there.

    Raises:
        DataError: as UnitEncoder.
        ChildProcessError: a worker died.
    """
    pending = [unit for unit in units if unit.number not in journal.checksums]
    total, left = (sum(unit.stop - unit.start for unit in some) for some in (units, pending))
    with ByteProgress("shards: encoded", total, total - left) as progress:
        for unit, digest in workers.run(encoder, pending):
            journal.add(unit, digest)
            progress.advance(unit.stop - unit.start)


def load_unit(directory: str | Path, number: int, split: Split) -> EncodedDocuments:
    with np.load(unit_file(directory, number)) as arrays:
        names = [name for name in EncodedDocuments.__annotations__ if f"{split}_{name}" in arrays]
        return EncodedDocuments(**{name: arrays[f"{split}_{name}"] for name in names})


def unit_lengths(directory: str | Path, number: int, split: Split) -> NDArray[np.int64]:
    """Tokens of each document of the unit."""
    with np.load(unit_file(directory, number)) as arrays:
        return arrays[f"{split}_lengths"]


def unit_file(directory: str | Path, number: int) -> Path:
    return Path(directory) / f"{number:06d}.npz"


class Journal:
    """Checksums of finished units: a line with their inputs, then one line per unit, fsynced as it is written.

    It covers `units`, and adopts the entries of other journals in the directory about them. A line truncated by a crash
    is dropped; its unit is encoded again.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], units: Sequence[Unit]) -> None:
        self.checksums: dict[int, str] = {}
        numbers = {unit.number for unit in units}
        for journal in sorted(directory.glob("journal*.jsonl")):
            lines = list(_lines(journal))
            for line in lines[1:] if lines[:1] == [identity] else []:
                number, digest = line.get("unit"), line.get("checksum", "")
                if number in numbers and number not in self.checksums and _is(unit_file(directory, number), digest):
                    self.checksums[number] = digest
        for number in numbers - self.checksums.keys():
            for suffix in ("", ".tmp"):
                path = unit_file(directory, number)
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        self._path = directory / f"journal-{min(numbers, default=0):06d}-{max(numbers, default=0):06d}.jsonl"
        records = [identity, *(_record(number, digest) for number, digest in self.checksums.items())]
        atomic_write(self._path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def add(self, unit: Unit, digest: str) -> None:
        self.checksums[unit.number] = digest
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_record(unit.number, digest)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    for line in journal.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and checksum(path, "xxh3_128") == digest


def _record(number: int, digest: str) -> dict[str, Any]:
    return {"unit": number, "checksum": digest}


@lru_cache(maxsize=1)
def _opened(directory: str, engine: EngineName) -> tuple[Tokenizer, Encode]:
    tokenizer = Tokenizer.load(directory)
    return tokenizer, open_engine(engine, tokenizer)


@lru_cache(maxsize=1)  # its tables are as long as the vocabulary, and units are many
def _answer_finder(directory: str, engine: EngineName) -> AnswerFinder:
    tokenizer, _ = _opened(directory, engine)
    return AnswerFinder(tokenizer, form_of(directory, tokenizer))


def _batches(lines: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Yield (byte offsets, objects) of consecutive documents."""
    offsets: list[int] = []
    found: list[dict[str, Any]] = []
    characters = 0
    for offset, each in lines:
        offsets.append(offset)
        found.append(each)
        characters += len(each["text"]) + 1
        if characters >= BATCH_CHARACTERS:
            yield offsets, found
            offsets, found, characters = [], [], 0
    if found:
        yield offsets, found


def _score(path: Path, offset: int, line: dict[str, Any]) -> float:
    try:
        return number(line.get("score"))
    except ValueError as error:
        raise DataError(
            f'{where(path, offset)}: "score" holds {error}, not a finite number; run the download step again'
        ) from None


def _pack(
    ids: list[list[int]],
    sizes: list[int],
    offsets: list[int],
    dtype: np.dtype,
    answers: list[list[tuple[int, int]]] | None,
) -> EncodedDocuments:
    lengths = np.array([len(document) for document in ids], np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
    documents = EncodedDocuments(tokens, lengths, np.array(sizes, np.int64), np.array(offsets, np.int64))
    if answers is None:
        return documents
    ranges = np.array(list(chain.from_iterable(answers)), np.uint32).reshape(-1, 2)
    return replace(documents, answer_counts=np.array([len(some) for some in answers], np.int64), answers=ranges)


def _joined(parts: list[EncodedDocuments], dtype: np.dtype, with_answers: bool, with_scores: bool) -> EncodedDocuments:
    empty = _pack([], [], [], dtype, [] if with_answers else None)
    if with_scores:
        empty = replace(empty, scores=np.empty(0, np.float32))
    columns = [name for name, array in vars(empty).items() if array is not None]
    joined = {name: np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in columns}
    return EncodedDocuments(**joined)


def _save(path: Path, documents: dict[Split, EncodedDocuments]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    arrays = {
        f"{split}_{name}": array
        for split, part in documents.items()
        for name, array in vars(part).items()
        if array is not None
    }
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
