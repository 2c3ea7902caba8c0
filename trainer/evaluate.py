"""Held-out evaluation of a run's newest checkpoint: bits per byte by domain and source, and samples.

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

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.begin import begun_with
from trainer.data.answers import Ranges, trained
from trainer.data.chattemplate import Asking
from trainer.data.loader import IGNORED, MicroBatch, heldout_documents
from trainer.data.manifest import read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.distributed import pick_device
from trainer.errors import DataError
from trainer.fields import stored
from trainer.files import atomic_write
from trainer.generate import complete
from trainer.model.hybrid import HybridModel
from trainer.precision import Precision, device_capability, resolve_for_evaluation
from trainer.report import write_report
from trainer.spec import TokensSpec, TrainSpec
from trainer.trained import load_trained

log = logging.getLogger(__name__)

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


def run(spec: TrainSpec) -> dict[str, Any]:
    """Evaluate the newest checkpoint of the run; writes run_dir/eval.json and the report, and returns what it wrote.

    Raises:
        LaunchError, CheckpointError: no checkpoint, or none that verifies.
        DataError: held-out data is missing or damaged.
        SpecError: this device cannot run the spec.
    """
    began = time.monotonic()
    device = pick_device(spec.runtime.device)
    precision = resolve_for_evaluation(spec.precision, device_capability(device))
    trained = load_trained(spec, device, precision.autocast_dtype)
    by_source, domain_of, of_answers = _score_sources(spec, trained.model, trained.tokenizer, device, precision)
    with precision.autocast(device.type):
        texts = complete(
            trained.model,
            trained.tokenizer,
            spec.evaluate.prompts,
            max_tokens=spec.evaluate.sample_tokens,
            temperature=spec.evaluate.temperature,
            seed=spec.seed,
            asking=Asking(spec.tokens.tokenizer) if spec.evaluate.chat else None,
        )
    by_domain = _by_domain(by_source, domain_of)
    result = {
        "run": spec.run,
        "step": trained.checkpoint.step,
        "checkpoint_digest": trained.checkpoint.digest,
        "settings": stored(spec.evaluate),
        "device": device.type,
        "precision": precision.name,
        "domains": {domain: score.summary() for domain, score in by_domain.items()},
        "sources": {
            source: {"domain": domain_of[source], **score.summary()}
            | ({"scored": "answers"} if source in of_answers else {})
            for source, score in by_source.items()
        },
        "all": sum(by_source.values(), Score()).summary(),
        "samples": [{"prompt": p, "text": t} for p, t in zip(spec.evaluate.prompts, texts, strict=True)],
        "seconds": round(time.monotonic() - began, 3),
    }
    tokenizer = trained.tokenizer
    del trained  # one model in memory is enough
    if spec.init_from and (before := begun_with(spec, device, precision.autocast_dtype)) is not None:
        scores = _score_sources(spec, before, tokenizer, device, precision)[0]
        domains = {domain: score.summary() for domain, score in _by_domain(scores, domain_of).items()}
        result["begun_with"] = {"model": spec.init_from, "domains": domains}
    write_report(spec.run_dir, result)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    # last: it declares the task finished
    atomic_write(Path(spec.run_dir) / "eval.json", text.encode())
    for domain, score in by_domain.items():
        log.info("%s: %.4f bits per byte over %d tokens", domain, score.summary()["bits_per_byte"], score.tokens)
    return result


def _by_domain(by_source: dict[str, Score], domain_of: dict[str, str]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for source, score in by_source.items():
        found[domain_of[source]] = found.get(domain_of[source], Score()) + score
    return found


def _score_sources(
    spec: TrainSpec, model: HybridModel, tokenizer: Tokenizer, device: torch.device, precision: Precision
) -> tuple[dict[str, Score], dict[str, str], set[str]]:
    """The score of each source, its domain, and the set of sources of which only answers are scored."""
    budgets, domain_of = source_budgets(spec.tokens, spec.evaluate.max_tokens)
    byte_lengths = np.array(tokenizer.byte_lengths())
    scores, of_answers = {source: Score() for source in budgets}, set[str]()

    def scored_documents(source: str, documents: Iterable[tuple[NDArray, Ranges | None]]) -> Iterator[Scored]:
        """Yield documents cut to the remaining budget, and count the scored tokens."""
        score = scores[source]
        for document, answers in documents:
            if (room := budgets[source] - score.tokens) == 0:
                return
            if answers is not None:
                of_answers.add(source)
            ids, labels = labelled(document, answers, room)
            scored = labels[labels != IGNORED]
            if not len(scored):
                continue
            score.documents += 1
            score.tokens += len(scored)
            score.bytes += int(byte_lengths[scored].sum())
            yield ids, labels

    seq_len = spec.tokens.seq_len_after((spec.steps - 1) * spec.batch.tokens_per_step)  # that of the last step
    for source, group in groupby(heldout_documents(spec.tokens), key=itemgetter(0)):
        documents = scored_documents(source, ((ids, answers) for _, _, ids, answers in group))
        for batch in pack(documents, seq_len, spec.batch.micro_batch_rows * spec.tokens.seq_len // seq_len):
            with torch.inference_mode(), precision.autocast(device.type):
                arguments = (batch.ids_BT, batch.seq_idx_BT, batch.labels_BT)
                ce_sum = model(*(tensor.to(device) for tensor in arguments)).ce_sum
            assert ce_sum is not None
            scores[source].nats += float(ce_sum)
    if nothing := [source for source, score in scores.items() if not score.bytes]:
        raise DataError(
            f"{spec.tokens.shards}: no held-out text of source '{nothing[0]}' to score; raise data.heldout_fraction "
            "or train.evaluate.max_tokens",
        )
    return scores, domain_of, of_answers


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
