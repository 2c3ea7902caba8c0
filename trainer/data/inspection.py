"""Inspect data: verify files, count tokens, show training rows. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.answers import count_trained
from trainer.data.documents import SourceDocuments, open_shards, open_stream
from trainer.data.manifest import SPLITS, FileEntry, Manifest, Split, verify
from trainer.data.packing import lay_out
from trainer.data.plan import Cursor
from trainer.data.provenance import Origin
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.spec import TokensSpec


def damage(directory: str | Path, manifest: Manifest, checked: Callable[[FileEntry], None]) -> list[DataError]:
    """Yield an error for each missing, truncated, changed or unreadable file, and for inconsistent indices.

    Args:
        checked: called after each file, perhaps from several threads.
    """

    def problem(entry: FileEntry) -> DataError | None:
        try:
            verify(directory, manifest, files=[entry], threads=1)
            return None
        except DataError as error:
            return error
        finally:
            checked(entry)

    with ThreadPoolExecutor() as pool:
        problems = [error for error in pool.map(problem, manifest.files) if error]
    if manifest.kind == "shards" and not problems:
        for source in manifest.sources:
            for split in SPLITS:
                try:
                    SourceDocuments(Path(directory), manifest, source, split).check()
                except DataError as error:
                    problems.append(error)
    return problems


@dataclass(frozen=True)
class SourceTotals:
    """One source of a shards directory; `lengths`: tokens of each document, both splits."""

    name: str
    domain: str
    licence: str
    documents: int
    train_tokens: int
    heldout_tokens: int
    text_bytes: int
    lengths: NDArray[np.int32]

    @property
    def tokens(self) -> int:
        return self.train_tokens + self.heldout_tokens


def totals(directory: str | Path, manifest: Manifest) -> list[SourceTotals]:
    """Totals of each source of a shards directory.

    Raises:
        DataError: a shard is missing or truncated.
    """
    rows = []
    for name, source in manifest.sources.items():
        train, heldout = (manifest.counts(name, split).tokens for split in SPLITS)
        counts = manifest.counts(name)
        lengths = np.concatenate([SourceDocuments(Path(directory), manifest, name, split).lengths for split in SPLITS])
        rows.append(
            SourceTotals(
                name,
                source.domain,
                source.licence,
                counts.documents,
                train,
                heldout,
                counts.text_bytes,
                lengths,
            )
        )
    return rows


@dataclass(frozen=True)
class Passage:
    """Tokens [start, stop) of a document of `length` tokens, as text, with the document's raw line.

    `trained`: how many of them are answers, for a source that trains on answers only.
    """

    source: str
    document: int
    start: int
    stop: int
    length: int
    text: str
    origin: Origin | None
    trained: int | None


def documents(
    directory: str | Path, manifest: Manifest, tokenizer: Tokenizer, source: str, split: Split, first: int, count: int
) -> Iterator[Passage]:
    """`count` complete documents of a source from number `first` on.

    Raises:
        DataError: no such source, or no such document.
    """
    if source not in manifest.sources:
        raise DataError(f"{directory}: has no source '{source}'; it has {', '.join(sorted(manifest.sources))}")
    found = SourceDocuments(Path(directory), manifest, source, split)
    if first >= len(found.lengths):
        raise DataError(
            f"{directory}: source '{source}' has {len(found.lengths)} documents in split {split}, counted from 0; "
            f"there is no number {first}"
        )
    for number in range(first, min(first + count, len(found.lengths))):
        yield _passage(found, tokenizer, source, number, 0, int(found.lengths[number]))


def training_row(
    tokens: TokensSpec, step_tokens: int, step: int, row: int, reached: tuple[int, Cursor] | None = None
) -> list[Passage]:
    """The documents of row `row` of training step `step` (both from 0), in order.

    Args:
        reached: step and cursor of a checkpoint at or before `step`, to start from; None starts at the beginning of the
            stream.

    Raises:
        DataError: as `open_shards`; the step has fewer rows.
    """
    directory, manifest = open_shards(tokens)
    done, cursor = reached or (0, None)
    sources, stream = open_stream(tokens, directory, manifest, cursor)
    assert done <= step
    for _ in range(done, step):
        stream.take(step_tokens)
    seq_len = tokens.seq_len_at(stream.position)
    rows = lay_out(stream.take(step_tokens), seq_len, tokens.packing)
    if row >= len(rows):
        raise DataError(f"the step has {len(rows)} rows of {seq_len} tokens, counted from 0; there is no row {row}")
    tokenizer = Tokenizer.load(tokens.tokenizer)
    names = list(tokens.mix)
    return [_passage(sources[s.source], tokenizer, names[s.source], s.document, s.start, s.stop) for s in rows[row]]


def _passage(
    found: SourceDocuments, tokenizer: Tokenizer, source: str, document: int, start: int, stop: int
) -> Passage:
    text = tokenizer.decode_part(found.tokens(document, start, stop).tolist())
    ranges = found.answers(document)
    trained = None if ranges is None else count_trained(ranges, start, stop)
    return Passage(source, document, start, stop, int(found.lengths[document]), text, found.origin(document), trained)
