"""Validation during training: bits per byte of held-out text by domain, and samples, every so many steps.

It changes nothing of the run: it has its own documents (the loader's cursor does not move), the model is in evaluation
mode without gradients, no random number of the run is drawn, and router biases, FP8 scales and the spike guard see
nothing of it. As in the task evaluate, products are computed without FP8 and layers without the compiler, which so need
not compile a second form of every layer.

Micro-batches are as large as in training and are dealt to the ranks in turn. All ranks run the model equally often,
with empty batches at the end, since under FSDP2 and expert parallelism they compute together.

Legend: B rows, T positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from trainer.data.chattemplate import Asking
from trainer.data.loader import IGNORED, MicroBatch
from trainer.data.tokenizer import Tokenizer
from trainer.distributed import World
from trainer.errors import ForeseenError, in_words
from trainer.generate import complete
from trainer.model.hybrid import HybridModel
from trainer.parallel.layout import Layout
from trainer.precision import Precision
from trainer.scoring import Heldout, Scored, nats, pack, rows_of
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

FIGURES = ("bits_per_byte", "loss", "tokens", "bytes")  # of each domain, of those in eval.json
OF_SOURCE = ("bits_per_byte", "bytes")


class Validation:
    """One per rank; its creation and `measure` are collectives of all ranks.

    Raises:
        DataError: held-out text is missing or damaged. All ranks raise.
    """

    def __init__(
        self, spec: TrainSpec, world: World, layout: Layout, model: HybridModel, precision: Precision, *, compiles: bool
    ) -> None:
        self._spec, self._world, self._model, self._compiles = spec, world, model, compiles
        self._precision = replace(precision, fp8=None)
        read: tuple[Heldout, dict[str, list[Scored]]] | None = None
        problem: ForeseenError | None = None
        if world.is_main:  # one rank reads, so that a volume serves a file once, and all know of a problem
            try:
                read = _read(spec)
            except ForeseenError as error:
                problem = error
        read, problem = world.broadcast((read, problem))
        if problem is not None:
            raise problem
        assert read is not None
        self._heldout: Heldout = read[0]
        self._documents: dict[str, list[Scored]] = read[1]
        self._batches: tuple[int, list[tuple[int, MicroBatch]]] = (0, [])
        prompts = spec.evaluate.prompts
        self._generates = bool(prompts) and world.is_main and layout.data == "ddp" and layout.expert == 1
        if prompts and world.is_main and not self._generates:
            log.info("validation: no samples before the end of training, as no rank holds the whole model")

    def is_due(self, step: int) -> bool:
        """Whether the model is measured after this step, counted from 1."""
        every = self._spec.evaluate.every_steps
        return every is not None and (step % every == 0 or step == self._spec.steps)

    def measure(self, step: int, tokens: int, seq_len: int, beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """A line of validation.jsonl.

        Args:
            tokens: trained on so far.
            seq_len: length of the rows.
            beat: called after each pass of the model.
        """
        began = time.perf_counter()
        with self._evaluating():
            self._score(seq_len, beat)
            samples = self._samples() if self._generates else []
        domains = {name: score.summary() for name, score in self._heldout.by_domain().items()}
        return {
            "step": step,
            "tokens": tokens,
            "domains": {name: {key: summary[key] for key in FIGURES} for name, summary in domains.items()},
            "sources": {
                name: {key: score.summary()[key] for key in OF_SOURCE} for name, score in self._heldout.scores.items()
            },
            "samples": samples,
            "seconds": round(time.perf_counter() - began, 3),
        }

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode; afterwards in training mode and, under FSDP2, cut again."""
        eager = torch.compiler.set_stance("force_eager") if self._compiles else nullcontext()
        self._model.eval()
        try:
            with eager:
                yield
        finally:
            self._model.train()
            for module in self._model.modules():
                if isinstance(module, FSDPModule):  # else the root stays whole until its next backward pass
                    module.reshard()

    @torch.no_grad()  # not inference_mode: what FSDP2 gathers would stay unusable for training
    def _score(self, seq_len: int, beat: Callable[[], None]) -> None:
        device, scores = self._world.device, self._heldout.scores
        sums = torch.zeros(len(scores), dtype=torch.float64, device=device)
        for source, batch in self._own(seq_len):
            with self._precision.autocast(device.type):
                sums[source] += nats(self._model, batch, device).double()
            beat()
        dist.all_reduce(sums)
        for score, total in zip(scores.values(), sums.tolist(), strict=True):
            score.nats = total

    def _own(self, seq_len: int) -> list[tuple[int, MicroBatch]]:
        """This rank's batches, with the number of each one's source; equally many on all ranks."""
        if self._batches[0] != seq_len:
            rows = rows_of(self._spec, seq_len)
            everything = [
                (number, _full(batch, rows))
                for number, documents in enumerate(self._documents[source] for source in self._heldout.scores)
                for batch in pack(documents, seq_len, rows)
            ]
            rank, size = self._world.rank, self._world.size
            nothing = _empty(rows, seq_len)
            everything += [(0, nothing)] * (-len(everything) % size)
            self._batches = (seq_len, everything[rank::size])
        return self._batches[1]

    def _samples(self) -> list[dict[str, str]]:
        """None at all where they cannot be generated now, such as for memory; a training does not end for that."""
        spec, directory = self._spec.evaluate, self._spec.tokens.tokenizer
        try:
            with self._precision.autocast(self._world.device.type):
                texts = complete(
                    self._model,
                    Tokenizer.load(directory),
                    spec.prompts,
                    max_tokens=spec.sample_tokens,
                    temperature=spec.temperature,
                    seed=self._spec.seed,
                    asking=Asking(directory) if spec.chat else None,
                )
        except (ForeseenError, torch.OutOfMemoryError) as error:
            log.warning("validation: no samples (%s)", in_words(error))
            return []
        return [{"prompt": prompt, "text": text} for prompt, text in zip(spec.prompts, texts, strict=True)]


def _empty(rows: int, seq_len: int) -> MicroBatch:
    """A batch without labels."""
    labels_BT = torch.full((rows, seq_len), IGNORED, dtype=torch.int64)
    ids_BT, seq_idx_BT = torch.zeros_like(labels_BT), torch.zeros(rows, seq_len, dtype=torch.int32)
    return MicroBatch(ids_BT, labels_BT, seq_idx_BT)


def _full(batch: MicroBatch, rows: int) -> MicroBatch:
    """The batch with empty rows below, so that all batches have the shape of training."""
    missing = rows - batch.ids_BT.shape[0]
    if not missing:
        return batch
    empty = _empty(missing, batch.ids_BT.shape[1])
    return MicroBatch(
        torch.cat([batch.ids_BT, empty.ids_BT]),
        torch.cat([batch.labels_BT, empty.labels_BT]),
        torch.cat([batch.seq_idx_BT, empty.seq_idx_BT]),
    )


def _read(spec: TrainSpec) -> tuple[Heldout, dict[str, list[Scored]]]:
    """The documents of each source, cut to `every_max_tokens`."""
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    heldout = Heldout(spec.tokens, tokenizer, spec.evaluate.every_max_tokens, "train.evaluate.every_max_tokens")
    return heldout, {source: list(documents) for source, documents in heldout.documents()}
