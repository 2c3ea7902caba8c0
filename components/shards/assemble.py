"""Units → shards: the documents of a source and split, in the order of the raw text, cut into files of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.shards.units import Unit, load_unit, unit_lengths
from trainer.data import answers, scores
from trainer.data.format import ShardWriter, token_dtype
from trainer.data.manifest import SPLITS, FileEntry, Split, file_entry
from trainer.data.provenance import SUFFIX, OriginsWriter


@dataclass(frozen=True)
class Piece:
    """Documents [first, last) of a unit."""

    unit: Unit
    first: int
    last: int


@dataclass(frozen=True)
class ShardPlan:
    """The content of one shard. Plans are independent, so that shards can be written in parallel."""

    name: str
    source: str
    split: Split
    pieces: list[Piece] = field(default_factory=list)


def plan_shards(
    units_dir: Path, units: Sequence[Unit], max_tokens: int, numbers: Mapping[tuple[str, Split], int]
) -> Iterator[ShardPlan]:
    """Fill each shard with whole documents up to `max_tokens`; sources follow each other in the order of the units.

    Args:
        numbers: the number of each source's and split's first shard; default 0.
    """
    for source in dict.fromkeys(unit.source for unit in units):
        for split in SPLITS:
            number, room = numbers.get((source, split), 0), max_tokens
            shard = ShardPlan(f"{source}-{split}-{number:05d}", source, split)
            for unit in units:
                if unit.source != source:
                    continue
                ends = np.cumsum(unit_lengths(units_dir, unit.number, split))
                first = before = 0
                while first < len(ends):
                    last = int(np.searchsorted(ends, before + room, side="right"))
                    if last > first:
                        shard.pieces.append(Piece(unit, first, last))
                        room -= int(ends[last - 1]) - before
                    if last < len(ends):
                        assert shard.pieces, "a document larger than a shard; the encoder refuses these"
                        yield shard
                        number, room = number + 1, max_tokens
                        shard = ShardPlan(f"{source}-{split}-{number:05d}", source, split)
                        before = int(ends[last - 1]) if last else 0
                    first = last
            if shard.pieces:
                yield shard


@dataclass(frozen=True)
class ShardMaker:
    """Writes one shard: `.bin`, `.idx` and `.docs`, `.answers` if its source trains on answers only, and `.scores` if
    it is ordered by a score.

    Sent to the worker processes.
    """

    directory: str
    units_dir: str
    vocab_size: int

    def __call__(self, plan: ShardPlan) -> list[FileEntry]:
        """The entries of the shard's files for the manifest.

        Raises:
            OSError: the files cannot be written.
        """
        directory, text_bytes = Path(self.directory), 0
        files = list(dict.fromkeys(piece.unit.path for piece in plan.pieces))
        origins = OriginsWriter(directory / plan.name, files)
        found = list[scores.Scores]()
        answer_counts, ranges = list[NDArray[np.int64]](), list[answers.Ranges]()
        with ShardWriter(directory / plan.name, token_dtype(self.vocab_size)) as writer:
            for piece in plan.pieces:
                documents = load_unit(self.units_dir, piece.unit.number, plan.split)
                chosen = slice(piece.first, piece.last)
                before = int(documents.lengths[: piece.first].sum())
                lengths = documents.lengths[chosen]
                writer.append(documents.tokens[before : before + int(lengths.sum())], lengths)
                origins.append(files.index(piece.unit.path), documents.offsets[chosen])
                text_bytes += int(documents.text_bytes[chosen].sum())
                if documents.answer_counts is not None and documents.answers is not None:
                    counts = documents.answer_counts
                    before = int(counts[: piece.first].sum())
                    answer_counts.append(counts[chosen])
                    ranges.append(documents.answers[before : before + int(counts[chosen].sum())])
                if documents.scores is not None:
                    found.append(documents.scores[chosen])
        origins.close()
        suffixes = [SUFFIX]
        if found:
            scores.write_scores(directory / plan.name, np.concatenate(found))
            suffixes.append(scores.SUFFIX)
        if answer_counts:
            answers.write_answers(directory / plan.name, np.concatenate(answer_counts), np.concatenate(ranges))
            suffixes.append(answers.SUFFIX)
        of: dict[str, Any] = {"source": plan.source, "split": plan.split}
        amounts: dict[str, Any] = {"documents": writer.sequences, "tokens": writer.tokens, "text_bytes": text_bytes}
        return [
            file_entry(directory, f"{plan.name}.bin", **of, **amounts),
            file_entry(directory, f"{plan.name}.idx", **of),
            *(file_entry(directory, f"{plan.name}{suffix}", **of) for suffix in suffixes),
        ]
