"""Documents of a shards directory by source and number, and the token stream over them. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data import answers
from trainer.data import scores as scored
from trainer.data.answers import Answers, Ranges
from trainer.data.format import QUICK, Shard
from trainer.data.manifest import Manifest, Split, read_manifest, verify
from trainer.data.plan import Cursor, TokenStream
from trainer.data.provenance import SUFFIX, Origin, Origins
from trainer.errors import DataError
from trainer.spec import TokensSpec


class SourceDocuments:
    """All documents of one source and split, numbered through its shards in the manifest's order.

    `answers_only`: only the answers in them are trained and scored.
    """

    def __init__(self, directory: Path, manifest: Manifest, source: str, split: Split) -> None:
        entries = [e for e in manifest.select(source, split) if e.path.endswith(".bin")]
        self.shards = [Shard(directory / e.path.removesuffix(".bin")) for e in entries]
        for entry, shard in zip(entries, self.shards, strict=True):
            if (len(shard), shard.num_tokens) != (entry.documents, entry.tokens):
                raise DataError(f"{directory / entry.path}: counts differ from the manifest; run the shards step again")
        listed = {e.path for e in manifest.select(source, split) if e.path.endswith(answers.SUFFIX)}
        self.answers_only = bool(listed)
        if listed and len(listed) < len(entries):
            raise DataError(
                f"{directory}: only some shards of source '{source}' have .answers; run the shards step again"
            )
        self._answers = [Answers(s.prefix, len(s)) for s in self.shards] if listed else []
        for shard, found in zip(self.shards, self._answers, strict=False):
            if len(shard) <= QUICK:
                found.check(shard.lengths)
        self.lengths: NDArray[np.int32] = np.concatenate([np.empty(0, np.int32), *(s.lengths for s in self.shards)])
        self._firsts = np.cumsum([0, *(len(s) for s in self.shards)]).tolist()

    def scores(self) -> NDArray[np.float32]:
        """The score of each document.

        Raises:
            DataError: the shards have none, or a list is damaged.
        """
        return np.concatenate([np.empty(0, np.float32), *(scored.read_scores(s.prefix, len(s)) for s in self.shards)])

    def origin(self, document: int) -> Origin | None:
        """The raw line of a document; None for shards without such a list.

        Raises:
            DataError: the list is damaged.
        """
        shard = bisect_right(self._firsts, document) - 1
        prefix, first = self.shards[shard].prefix, self._firsts[shard]
        if not prefix.with_name(prefix.name + SUFFIX).exists():
            return None
        return Origins(prefix, len(self.shards[shard]))[document - first]

    def check(self) -> None:
        """Raise DataError if a shard's index or list of answers is inconsistent."""
        for shard in self.shards:
            shard.check()
        for shard, found in zip(self.shards, self._answers, strict=False):
            found.check(shard.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Tokens [start, stop) of a document, as a view of the mapped file."""
        shard = bisect_right(self._firsts, document) - 1
        return self.shards[shard].document(document - self._firsts[shard], start, stop)

    def answers(self, document: int) -> Ranges | None:
        """The token ranges of a document's answers; None for a source whose loss is on all tokens."""
        if not self.answers_only:
            return None
        shard = bisect_right(self._firsts, document) - 1
        return self._answers[shard][document - self._firsts[shard]]


def open_shards(tokens: TokensSpec, digest: str | None = None) -> tuple[Path, Manifest]:
    """The shards' directory and manifest, after the checks that do not read tokens.

    Args:
        digest: digest of the generation that all ranks use; None for the newest.

    Raises:
        DataError: data is missing, has another size, was made with another tokenizer or lacks a source of the mix; or
            the tokenizer is damaged.
    """
    directory = Path(tokens.shards)
    manifest = shards_manifest(tokens, digest)
    tokenizer = read_manifest(tokens.tokenizer, "tokenizer")
    if tokenizer.digest != manifest.inputs.get("tokenizer"):
        raise DataError(
            f"{tokens.tokenizer}: not the tokenizer that {tokens.shards} was made with; "
            "name that one, or run the shards step"
        )
    verify(tokens.tokenizer, tokenizer)
    for name in tokens.mix:
        if name not in manifest.sources:
            raise DataError(
                f"{tokens.shards}: has no source '{name}' of the mix; it has {', '.join(sorted(manifest.sources))}"
            )
    verify(directory, manifest, sizes_only=True)
    return directory, manifest


def shards_manifest(tokens: TokensSpec, digest: str | None = None) -> Manifest:
    """The manifest of the shards, or its earlier generation with this digest.

    Raises:
        DataError: there is no manifest, or no such generation.
    """
    newest = read_manifest(tokens.shards, "shards")
    if (manifest := newest.at(digest or newest.digest)) is None:
        raise DataError(
            f"{tokens.shards}: rank 0 sees other shards there ({(digest or '')[:12]}) than this rank "
            f"({newest.digest[:12]}); all nodes must mount the same volume; start again if it was just written"
        )
    return manifest


def open_stream(
    tokens: TokensSpec, directory: Path, manifest: Manifest, cursor: Cursor | None = None
) -> tuple[list[SourceDocuments], TokenStream]:
    """The training documents of the mix's sources, in its order, and the stream over them from `cursor` on.

    Raises:
        DataError: as SourceDocuments and TokenStream.
    """
    sources = [SourceDocuments(directory, manifest, name, "train") for name in tokens.mix]
    lengths = {name: source.lengths for name, source in zip(tokens.mix, sources, strict=True)}
    earlier = [
        (generation.digest, {name: part.counts(name, "train").documents for name in tokens.mix})
        for generation, part in zip(manifest.earlier, manifest.parts, strict=False)  # without the newest
    ]
    columns = manifest.settings.get("score_columns", {})
    for name, mix in tokens.mix.items():
        if mix.order and mix.order.by != "length" and columns.get(name) != mix.order.column:
            raise DataError(
                f"{directory}: the scores of source '{name}' are by {columns.get(name, 'compression')}, not by "
                f"{mix.order.column or mix.order.by} as its order; run the shards step of a job with this order"
            )
    scores = {
        name: source.scores()
        for (name, mix), source in zip(tokens.mix.items(), sources, strict=True)
        if mix.order and mix.order.by != "length"
    }
    stream = TokenStream(
        lengths,
        tokens.mix,
        tokens.seed,
        manifest.digest,
        earlier=earlier,
        curriculum=tokens.curriculum,
        skip=tokens.skip,
        cursor=cursor,
        scores=scores,
    )
    return sources, stream
