"""Small shard directories for the tests of the data path."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.answers import write_answers
from trainer.data.format import ShardWriter, token_dtype
from trainer.data.manifest import Manifest, SourceEntry, file_entry, write_manifest
from trainer.spec import MixSpec, TokensSpec

VOCAB = 4096


def random_documents(seed: int, count: int, longest: int = 120) -> list[np.ndarray]:
    """Documents of 1 … `longest` tokens that end in EOD (0) and contain no other 0."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCAB, rng.integers(1, longest + 1)).astype(np.uint16) for _ in range(count)]
    for document in documents:
        document[-1] = 0
    return documents


def odd_ranges(document: np.ndarray) -> np.ndarray:
    """The ranges [start, stop) of a document's odd tokens."""
    steps = np.diff((document % 2).astype(np.int8), prepend=0, append=0)
    return np.stack([np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)], 1).astype(np.uint32)


def write_shards(
    directory: Path,
    documents: dict[str, dict[str, list[np.ndarray]]],
    shards_each: int = 2,
    answers: tuple[str, ...] = (),
) -> Manifest:
    """`documents[source][split]` as `shards_each` shards for each source and split, with tokenizer manifest beside.

    Of the sources in `answers`, the odd tokens are the answers.
    """
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "shards").mkdir()
    tokenizer = Manifest(kind="tokenizer", files=[])
    write_manifest(directory / "tokenizer", tokenizer)
    files = []
    for source, splits in documents.items():
        for split, all_documents in splits.items():
            for number in range(shards_each):
                part = all_documents[number::shards_each]
                name = f"{source}-{split}-{number:05d}"
                with ShardWriter(directory / "shards" / name, token_dtype(VOCAB)) as writer:
                    for document in part:
                        writer.append(document, np.array([len(document)]))
                counts = {"documents": writer.sequences, "tokens": writer.tokens}
                files += [
                    file_entry(directory / "shards", f"{name}.bin", source=source, split=split, **counts),
                    file_entry(directory / "shards", f"{name}.idx", source=source, split=split),
                ]
                if source in answers:
                    ranges = [odd_ranges(document) for document in part]
                    write_answers(directory / "shards" / name, np.array([*map(len, ranges)]), np.concatenate(ranges))
                    files.append(file_entry(directory / "shards", f"{name}.answers", source=source, split=split))
    sources = {n: SourceEntry(domain=n[:2], licence="CC0", origin="made", revision="1") for n in documents}
    manifest = Manifest(kind="shards", inputs={"tokenizer": tokenizer.digest}, sources=sources, files=files)
    write_manifest(directory / "shards", manifest)
    return manifest


def tokens_spec(directory: Path, weights: dict[str, float], **fields: object) -> TokensSpec:
    mix = {name: MixSpec(weight=weight, max_epochs=1000) for name, weight in weights.items()}
    values = {"mix": mix, "seq_len": 32} | fields
    return TokensSpec(shards=str(directory / "shards"), tokenizer=str(directory / "tokenizer"), **values)
