"""Batches for one rank, cut from the global token stream.

Shapes: B rows of a micro-batch, T tokens of a row.

A step is the next `tokens_per_step` tokens of the stream (trainer/data/plan.py), packed into rows of T by
trainer/data/packing.py. Rank r of w trains on rows [r·rows/w, (r+1)·rows/w), in order, so the rows of a step depend
neither on the number of ranks nor on the micro-batch size. Every rank walks the whole stream, at a few comparisons per
document, and reads only its own tokens.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.answers import Ranges, count_trained, trained
from trainer.data.documents import SourceDocuments, open_shards, open_stream
from trainer.data.manifest import Manifest, verify
from trainer.data.packing import lay_out
from trainer.data.plan import Cursor, Segment
from trainer.errors import DataError
from trainer.spec import BatchSpec, TokensSpec

IGNORED = -100  # label of positions without a next token; cross_entropy's default ignore_index
SMALL_BYTES = 2**30  # shards up to this size are verified before the first step, larger ones during training
PREFETCH_STEPS = 2


@dataclass(frozen=True)
class MicroBatch:
    """Labels: the next token of the same document; -100 if there is none or if it is not trained.

    `seq_idx_BT` numbers the documents within a row (all 0 without the document mask, which makes a row one document);
    `num_documents` are those of all rows, None if not counted.
    """

    ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64
    seq_idx_BT: torch.Tensor  # int32
    num_documents: int | None = None


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a step. `num_labels` and `num_rows` are totals over all ranks; ledger and cursor are those
    after the step. `answers_only`: in some sources only the answers have labels, so a step may have none at all."""

    micro_batches: list[MicroBatch]
    num_labels: int
    num_rows: int
    tokens_by_source: dict[str, int]
    cursor: Cursor
    answers_only: bool = False

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return int(self.micro_batches[0].ids_BT.shape[1])


class TokenLoader:
    """Yields the StepBatches of `rank` without end, prefetched by a thread.

    Args:
        steps: number of steps of the run; if given, the epoch caps of the mix are checked against it.
        shards_digest: digest of the generation of the shards that all ranks use; None for the newest.
        cursor: where to continue; None for the start.

    Raises:
        DataError: data is missing, changed, of another tokenizer, not that of the cursor, or too little for the caps.
            Also raised by iteration if the check during training finds a damaged shard.
    """

    def __init__(
        self,
        tokens: TokensSpec,
        batch: BatchSpec,
        *,
        rank: int,
        world_size: int,
        cursor: Cursor | None = None,
        steps: int | None = None,
        shards_digest: str | None = None,
    ) -> None:
        self._tokens, self._step_tokens = tokens, batch.tokens_per_step
        self._micro_tokens = batch.rows * tokens.seq_len
        self._rank, self._world_size = rank, world_size
        assert self._step_tokens % (world_size * self._micro_tokens) == 0, "TrainSpec.micro_batches checks this"
        self._errors: list[DataError] = []
        self._closed = threading.Event()
        directory, manifest = open_shards(tokens, shards_digest)
        self.digests = {"shards": manifest.digest, "tokenizer": manifest.inputs["tokenizer"]}
        self._sources, self._stream = open_stream(tokens, directory, manifest, cursor)
        if steps is not None:
            self._stream.check_caps(steps * batch.tokens_per_step)
        self._verify(directory, manifest)
        self._cursor = self._stream.cursor()
        self._failure: Exception | None = None
        # The device of this rank, which has built its model by now; None without a GPU.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._ready: queue.Queue[StepBatch] = queue.Queue(PREFETCH_STEPS)
        self._prefetcher = threading.Thread(target=self._prefetch, name="prefetch", daemon=True)
        self._prefetcher.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        assert not self._closed.is_set(), "the loader is closed"
        while True:
            if self._errors:
                raise self._errors[0]
            try:
                step = self._ready.get(timeout=0.5)
            except queue.Empty:
                if self._failure:
                    raise self._failure from None
            else:
                self._cursor = step.cursor
                return step

    def close(self) -> None:
        """Stop the threads; idempotent."""
        self._closed.set()
        self._prefetcher.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def left_out(self) -> int:
        """Number of documents that were appended to the shards too late for this run."""
        return self._stream.left_out

    @property
    def cursor(self) -> Cursor:
        """After the step that was taken last; before the first one, where this begins."""
        return self._cursor

    def epochs(self) -> dict[str, float]:
        """Epochs of each source up to the last yielded step."""
        return self._stream.epochs(self._cursor)

    def _verify(self, directory: Path, manifest: Manifest) -> None:
        """Verify checksums: at once if that is quick, else in one process of each node during training."""
        if sum(entry.bytes for entry in manifest.files) <= SMALL_BYTES:
            verify(directory, manifest)
            for source in self._sources:
                source.check()
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            threading.Thread(target=self._verify_beside, args=(directory, manifest), name="verify", daemon=True).start()

    def _verify_beside(self, directory: Path, manifest: Manifest) -> None:
        try:
            for source in self._sources:
                source.check()
            for entry in manifest.files:
                if self._closed.is_set():
                    return
                verify(directory, manifest, files=[entry])
        except DataError as error:
            self._errors.append(error)

    def _prefetch(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # new threads use GPU 0, and pinning there would use its memory
            while not self._closed.is_set():
                self._put(self._next_step())
        except Exception as error:  # raised when the next step is requested
            self._failure = error

    def _put(self, step: StepBatch) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(step, timeout=0.1)
                return
            except queue.Full:
                continue

    def _next_step(self) -> StepBatch:
        seq_len = self._tokens.seq_len_at(self._stream.position)
        rows = lay_out(self._stream.take(self._step_tokens), seq_len, self._tokens.packing)
        share = len(rows) // self._world_size
        own = rows[self._rank * share : (self._rank + 1) * share]
        micro_rows = self._micro_tokens // seq_len
        cursor = self._stream.cursor()
        return StepBatch(
            micro_batches=[
                self._micro_batch(own[first : first + micro_rows], seq_len) for first in range(0, share, micro_rows)
            ],
            num_labels=sum(self._num_labels(segment) for row in rows for segment in row),
            num_rows=len(rows),
            tokens_by_source=cursor.trained,
            cursor=cursor,
            answers_only=any(source.answers_only for source in self._sources),
        )

    def _num_labels(self, segment: Segment) -> int:
        """The number of labels of a segment: trained tokens among those that follow one of its tokens."""
        ranges = self._sources[segment.source].answers(segment.document)
        start, stop = segment.start + 1, segment.stop + segment.continues
        return stop - start if ranges is None else count_trained(ranges, start, stop)

    def _micro_batch(self, rows: list[list[Segment]], seq_len: int) -> MicroBatch:
        shape = (len(rows), seq_len)
        ids_BT = np.empty(shape, np.int64)
        labels_BT = np.empty(shape, np.int64)
        seq_idx_BT = np.empty(shape, np.int32)
        for row, segments in enumerate(rows):
            ids_T, labels_T, seq_idx_T = ids_BT[row], labels_BT[row], seq_idx_BT[row]
            at = 0
            for number, segment in enumerate(segments):
                stop = at + segment.stop - segment.start
                # One token more than the row, if it exists: the label of the last position.
                source, last = self._sources[segment.source], segment.stop + segment.continues
                piece = source.tokens(segment.document, segment.start, last)
                ids_T[at:stop] = piece[: stop - at]
                labels_T[at : at + len(piece) - 1] = piece[1:]
                if (ranges := source.answers(segment.document)) is not None:
                    labels_T[at : at + len(piece) - 1][~trained(ranges, segment.start + 1, last)] = IGNORED
                if not segment.continues:
                    labels_T[stop - 1] = IGNORED
                seq_idx_T[at:stop] = number if self._tokens.document_mask else 0
                at = stop
        tensors = [torch.from_numpy(array) for array in (ids_BT, labels_BT, seq_idx_BT)]
        # Only a copy from pinned memory overlaps with computation.
        ids, labels, seq_idx = tensors if self._gpu is None else [tensor.pin_memory() for tensor in tensors]
        documents = [len(segments) if self._tokens.document_mask else 1 for segments in rows]
        return MicroBatch(ids, labels, seq_idx, num_documents=sum(documents))


def heldout_documents(tokens: TokensSpec) -> Iterator[tuple[str, str, NDArray[np.integer], Ranges | None]]:
    """Yield (source, domain, tokens with EOD, answers) of every held-out document of the mix, in a fixed order.

    `answers` are the only token ranges that are scored; None if all tokens are.

    Raises:
        DataError: data is missing, changed or of another tokenizer.
    """
    directory, manifest = open_shards(tokens)
    verify(directory, manifest, files=[entry for entry in manifest.files if entry.split == "heldout"])
    for name in tokens.mix:
        documents = SourceDocuments(directory, manifest, name, "heldout")
        for document in range(len(documents.lengths)):
            domain = manifest.sources[name].domain
            yield name, domain, documents.tokens(document), documents.answers(document)
