"""Scoring held-out text: bits per byte by source and domain. Used by the task evaluate and during training.

Bits per byte is comparable between tokenizers, unlike the loss per token. The exact definition:

- every token of a held-out document except the first is scored, given the tokens before it in the document. The
  end-of-document token is scored too. The first token has no context and is never predicted in training either;
- a document longer than `seq_len` is cut into windows of `seq_len` inputs. As in training, a window starts without the
  context of the one before;
- in a source with `loss: answers` only the tokens of the answers are scored, including the end-of-turn token; the rest
  of the conversation is context;
- the bytes are those of the scored tokens (special tokens have none), so cutting at `max_tokens` stays exact;
- `max_tokens` of a domain is shared among its sources in proportion to their weight in the mix.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.answers import Ranges, trained
from trainer.data.loader import IGNORED, MicroBatch, heldout_documents
from trainer.data.manifest import read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.model.hybrid import HybridModel
from trainer.precision import Precision
from trainer.spec import TokensSpec, TrainSpec

Scored = tuple[NDArray[np.int64], NDArray[np.int64]]  # ids of a document; labels (or -100) of all ids but the last


@dataclass
class Score:
    """Sums over scored tokens; `nats` is their negative log-likelihood."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )

    def summary(self) -> dict[str, float | int]:
        loss = self.nats / self.tokens
        return {
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


class Heldout:
    """The held-out documents of a mix, cut to a budget, and the scores of its sources.

    Args:
        budget_field: the field of the spec that says `max_tokens`, for errors.

    Attributes:
        scores: tokens, bytes and documents are counted as documents are read; whoever runs the model adds `nats`.
        domain_of: the domain of each source.
        of_answers: the sources of which only answers are scored.

    Raises:
        DataError: the shards have no manifest, or it lacks a source of the mix.
    """

    def __init__(
        self,
        tokens: TokensSpec,
        tokenizer: Tokenizer,
        max_tokens: int,
        budget_field: str = "train.evaluate.max_tokens",
    ) -> None:
        self._tokens, self._budget_field = tokens, budget_field
        self._budgets, self.domain_of = source_budgets(tokens, max_tokens)
        self._byte_lengths = np.array(tokenizer.byte_lengths())
        self.scores = {source: Score() for source in self._budgets}
        self.of_answers = set[str]()

    def documents(self) -> Iterator[tuple[str, Iterator[Scored]]]:
        """Yield each source with its documents, to be read one source after the other, and once.

        Raises:
            DataError: data is missing, changed or of another tokenizer; after the last one, a source has no text.
        """
        for source, group in groupby(heldout_documents(self._tokens), key=itemgetter(0)):
            yield source, self._scored(source, ((ids, answers) for _, _, ids, answers in group))
        if nothing := [source for source, score in self.scores.items() if not score.bytes]:
            raise DataError(
                f"{self._tokens.shards}: no held-out text of source '{nothing[0]}' to score; raise "
                f"data.heldout_fraction or {self._budget_field}",
            )

    def by_domain(self) -> dict[str, Score]:
        """The sums of each domain's sources."""
        found: dict[str, Score] = {}
        for source, score in self.scores.items():
            found[self.domain_of[source]] = found.get(self.domain_of[source], Score()) + score
        return found

    def _scored(self, source: str, documents: Iterable[tuple[NDArray, Ranges | None]]) -> Iterator[Scored]:
        """Yield documents cut to the remaining budget, and count the scored tokens."""
        score = self.scores[source]
        for document, answers in documents:
            if (room := self._budgets[source] - score.tokens) == 0:
                return
            if answers is not None:
                self.of_answers.add(source)
            ids, labels = labelled(document, answers, room)
            scored = labels[labels != IGNORED]
            if not len(scored):
                continue
            score.documents += 1
            score.tokens += len(scored)
            score.bytes += int(self._byte_lengths[scored].sum())
            yield ids, labels


def score_sources(
    spec: TrainSpec, model: HybridModel, tokenizer: Tokenizer, device: torch.device, precision: Precision
) -> Heldout:
    """The scores of a whole model on one process, over windows as long as the rows of the last step."""
    heldout = Heldout(spec.tokens, tokenizer, spec.evaluate.max_tokens)
    seq_len = spec.tokens.seq_len_after((spec.steps - 1) * spec.batch.tokens_per_step)
    for source, documents in heldout.documents():
        for batch in pack(documents, seq_len, rows_of(spec, seq_len)):
            with torch.inference_mode(), precision.autocast(device.type):
                heldout.scores[source].nats += float(nats(model, batch, device))
    return heldout


def nats(model: HybridModel, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """0-d, the negative log-likelihood of the labels of a batch."""
    ce_sum = model(*(tensor.to(device) for tensor in (batch.ids_BT, batch.seq_idx_BT, batch.labels_BT))).ce_sum
    assert ce_sum is not None
    return ce_sum


def rows_of(spec: TrainSpec, seq_len: int) -> int:
    """Rows of `seq_len` tokens in a micro-batch."""
    return spec.evaluation_rows * spec.tokens.seq_len // seq_len


def source_budgets(tokens: TokensSpec, max_tokens: int) -> tuple[dict[str, int], dict[str, str]]:
    """Tokens to score per source of the mix, at least 1, and the domain of each source.

    Raises:
        DataError: the shards have no manifest, or it lacks a source of the mix.
    """
    sources = read_manifest(tokens.shards, "shards").sources
    if absent := [name for name in tokens.mix if name not in sources]:
        raise DataError(f"{tokens.shards}: has no source '{absent[0]}' of the mix; it has {', '.join(sorted(sources))}")
    domain_of = {name: sources[name].domain for name in tokens.mix}
    weight_of: dict[str, float] = {}
    for name, mix in tokens.mix.items():
        weight_of[domain_of[name]] = weight_of.get(domain_of[name], 0.0) + mix.weight
    shares = {name: mix.weight / weight_of[domain_of[name]] for name, mix in tokens.mix.items()}
    return {name: max(1, int(max_tokens * share + 1e-6)) for name, share in shares.items()}, domain_of


def labelled(document: NDArray[np.integer], answers: Ranges | None, room: int) -> Scored:
    """A document's tokens up to the last of its first `room` scored ones, with labels."""
    if answers is None:
        ids = document[: room + 1].astype(np.int64)
        return ids, ids[1:]
    scored = trained(answers, 0, len(document))
    scored[0] = False
    end = int(np.flatnonzero(scored)[:room].max(initial=0)) + 1
    ids = document[:end].astype(np.int64)
    return ids, np.where(scored[1:end], ids[1:], IGNORED)


def pack(documents: Iterable[Scored], seq_len: int, num_rows: int) -> Iterator[MicroBatch]:
    """Pack windows of documents into rows of `seq_len`; a window never crosses a row.

    Every label of a document appears in exactly one row. Unused positions are separate documents without labels.
    """
    rows: list[list[Scored]] = [[]]
    room = seq_len
    for ids, labels in documents:
        for first in range(0, len(labels), seq_len):
            window = (ids[:-1][first : first + seq_len], labels[first : first + seq_len])
            if len(window[1]) > room:
                if len(rows) == num_rows:
                    yield _batch(rows, seq_len)
                    rows = []
                rows.append([])
                room = seq_len
            rows[-1].append(window)
            room -= len(window[1])
    if rows[0]:
        yield _batch(rows, seq_len)


def _batch(rows: list[list[Scored]], seq_len: int) -> MicroBatch:
    ids_BT = np.zeros((len(rows), seq_len), np.int64)
    labels_BT = np.full((len(rows), seq_len), IGNORED, np.int64)
    seq_idx_BT = np.zeros((len(rows), seq_len), np.int32)
    for row, windows in enumerate(rows):
        at = 0
        for number, (ids, labels) in enumerate(windows):
            end = at + len(labels)
            ids_BT[row, at:end] = ids
            labels_BT[row, at:end] = labels
            seq_idx_BT[row, at:end] = number
            at = end
        seq_idx_BT[row, at:] = len(windows)
    return MicroBatch(*(torch.from_numpy(array) for array in (ids_BT, labels_BT, seq_idx_BT)))
