"""Units of tokenization: byte ranges of raw files, encoded by a pool of processes, each kept across crashes once done.

A unit's bounds follow from the raw files and `unit_bytes` alone. A worker writes a unit's tokens to a temporary file,
syncs and renames it; then the parent appends its checksum to the journal. After a crash every journalled unit is taken
as it is and the others are done again, so the outcome depends neither on crashes nor on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from components.progress import ByteProgress
from trainer.data.format import token_dtype
from trainer.data.jsonl import documents, where
from trainer.data.manifest import DataError, Manifest, Split, atomic_write, checksum, sync_directory
from trainer.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**19  # text encoded at once; keeps a worker's memory flat
SPLITS: tuple[Split, Split] = ("train", "heldout")
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
    """Documents of a unit and split: tokens back to back, and tokens and UTF-8 text bytes of each."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]


@dataclass(frozen=True)
class UnitEncoder:
    """Encodes one unit; sent to the worker processes. All that a unit's bytes depend on is in here and in the unit."""

    raw_dir: str
    tokenizer_dir: str
    out_dir: str
    heldout_fraction: float
    max_document_bytes: int

    def __call__(self, unit: Unit) -> str:
        """Write the unit's file and return its checksum.

        Raises:
            DataError: a malformed line, or a document too large for a shard; names file and line.
        """
        tokenizer = _tokenizer(self.tokenizer_dir)
        dtype = token_dtype(tokenizer.vocab_size)
        parts: dict[Split, list[EncodedDocuments]] = {split: [] for split in SPLITS}
        path = Path(self.raw_dir) / unit.path
        for lines in _batches(documents(path, unit.start, unit.stop)):
            texts = [text for _, text in lines]
            ids = [[*document, tokenizer.eod_id] for document in tokenizer.encode_batch(texts)]
            for (offset, _), document in zip(lines, ids, strict=True):
                if len(document) * dtype.itemsize > self.max_document_bytes:
                    raise DataError(
                        f"{where(path, offset)}: a document of {len(document)} tokens is larger than a shard; "
                        "raise shards.max_shard_bytes or cut the document"
                    )
            sizes = [len(text.encode()) for text in texts]
            heldout = [is_heldout(text, self.heldout_fraction) for text in texts]
            for split in SPLITS:
                chosen = [n for n, held in enumerate(heldout) if held == (split == "heldout")]
                parts[split].append(_pack([ids[n] for n in chosen], [sizes[n] for n in chosen], dtype))
        target = unit_file(self.out_dir, unit.number)
        _save(target, {split: _joined(parts[split], dtype) for split in SPLITS})
        return checksum(target, "xxh3_128")


def is_heldout(text: str, fraction: float) -> bool:
    """By the text's own hash: equal texts go to the same side, wherever they stand."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * _HASH_RANGE


def plan_units(manifest: Manifest, unit_bytes: int) -> list[Unit]:
    """The units of all raw files, in the manifest's order."""
    ranges = [
        (entry, start, min(start + unit_bytes, entry.bytes))
        for entry in manifest.files
        for start in range(0, entry.bytes, unit_bytes)
    ]
    return [Unit(n, entry.source or "", entry.path, start, stop) for n, (entry, start, stop) in enumerate(ranges)]


def encode_units(units: list[Unit], encoder: UnitEncoder, workers: int, identity: dict[str, Any]) -> int:
    """Encode the units that are not journalled yet; returns how many were already done.

    Args:
        identity: what the units are made from and how; a journal of another identity is discarded.

    Raises:
        DataError: as UnitEncoder.
        ChildProcessError: a worker died.
    """
    journal = Journal(Path(encoder.out_dir), identity)
    done = [unit for unit in units if unit.number in journal.checksums]
    pending = [unit for unit in units if unit.number not in journal.checksums]
    sizes = [sum(unit.stop - unit.start for unit in some) for some in (units, done)]
    with ByteProgress("shards: encoded", *sizes) as progress:
        for unit, digest in _encoded(pending, encoder, workers):
            journal.add(unit, digest)
            progress.advance(unit.stop - unit.start)
    return len(done)


def load_unit(directory: str | Path, number: int, split: Split) -> EncodedDocuments:
    with np.load(unit_file(directory, number)) as arrays:
        return EncodedDocuments(*(arrays[f"{split}_{name}"] for name in EncodedDocuments.__annotations__))


def unit_file(directory: str | Path, number: int) -> Path:
    return Path(directory) / f"{number:06d}.npz"


class Journal:
    """Checksums of finished units: a line that says what they are made from, then a line each, synced as it is written.

    A line cut short by a crash is dropped; its unit is done again.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self._path = directory / "journal.jsonl"
        self.checksums: dict[int, str] = {}
        lines = list(self._lines())
        if lines[:1] == [identity]:
            for line in lines[1:]:
                path = unit_file(directory, line["unit"])
                if path.is_file() and checksum(path, "xxh3_128") == line["checksum"]:
                    self.checksums[line["unit"]] = line["checksum"]
        kept = {unit_file(directory, number).name for number in self.checksums}
        for path in directory.iterdir():
            if path.name not in kept and path.suffix in (".npz", ".tmp"):
                path.unlink()
        records = [identity, *(_record(number, digest) for number, digest in self.checksums.items())]
        atomic_write(self._path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def add(self, unit: Unit, digest: str) -> None:
        self.checksums[unit.number] = digest
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_record(unit.number, digest)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def _record(number: int, digest: str) -> dict[str, Any]:
    return {"unit": number, "checksum": digest}


def _encoded(units: list[Unit], encoder: UnitEncoder, workers: int) -> Iterator[tuple[Unit, str]]:
    """Each unit with its checksum, in the order of completion."""
    if min(workers, len(units)) <= 1:
        for unit in units:
            yield unit, encoder(unit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(units)), context, initializer=_start_worker) as pool:
        futures = {pool.submit(encoder, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died; when no line above says why, it was killed, most often for want of memory: "
                "lower shards.workers or shards.unit_bytes and run again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One process a core: no threads of the tokenizer's own, and no life after the parent's death."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_loaded: dict[str, Tokenizer] = {}


def _tokenizer(directory: str) -> Tokenizer:
    if directory not in _loaded:
        _loaded.clear()
        _loaded[directory] = Tokenizer.load(directory)
    return _loaded[directory]


def _batches(lines: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for line in lines:
        batch.append(line)
        characters += len(line[1]) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pack(ids: list[list[int]], sizes: list[int], dtype: np.dtype) -> EncodedDocuments:
    lengths = np.array([len(document) for document in ids], np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
    return EncodedDocuments(tokens, lengths, np.array(sizes, np.int64))


def _joined(parts: list[EncodedDocuments], dtype: np.dtype) -> EncodedDocuments:
    empty = _pack([], [], dtype)
    columns = EncodedDocuments.__annotations__
    return EncodedDocuments(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in columns))


def _save(path: Path, documents: dict[Split, EncodedDocuments]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    arrays = {f"{split}_{name}": array for split, part in documents.items() for name, array in vars(part).items()}
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
