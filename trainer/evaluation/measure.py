"""The benchmarks of one checkpoint, as `train.evaluate` asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.data.chattemplate import Asking
from trainer.errors import SpecError
from trainer.evaluation import harness
from trainer.evaluation.scores import of_task
from trainer.precision import Precision
from trainer.recording.exporter import Metrics
from trainer.spec import TrainSpec
from trainer.trained import Trained

log = logging.getLogger(__name__)


def refuse(spec: TrainSpec) -> None:
    """Refuse benchmarks that cannot be run, before the model is loaded. Raises as `harness.refuse_unknown`."""
    harness.refuse_unknown(spec.evaluate)


def measure(spec: TrainSpec, trained: Trained, device: torch.device, precision: Precision) -> dict[str, Any]:
    """What eval.json says of benchmarks; empty without any. The scores are exported as metrics while it runs.

    Raises:
        LaunchError, DataError: as `harness.run`.
    """
    wanted = spec.evaluate
    if not wanted.benchmarks:
        return {}
    from trainer.evaluation.lm import HarnessModel

    longest = max([spec.tokens.seq_len, *(stage.seq_len or 0 for stage in spec.tokens.curriculum)])
    known = {
        "checkpoint": trained.checkpoint.digest,
        "precision": precision.name,
        "max_length": longest,
        "chat": wanted.chat,
        "seed": spec.seed,
    }
    with _served(spec.runtime.metrics_port) as metrics:

        def told(task: str, scores: dict[str, Any]) -> None:
            for row in of_task(task, scores):
                metrics.set("benchmark_score", row.value, task=row.task, metric=row.metric)
                log.info("%s: %s %s", row.task, row.metric, row.text)

        lm = HarnessModel(
            trained.model,
            trained.tokenizer,
            spec.tokens.tokenizer,
            max_length=longest,
            batch_tokens=spec.batch.micro_batch_rows * spec.tokens.seq_len,
            autocast=lambda: precision.autocast(device.type),
            asking=Asking(spec.tokens.tokenizer) if wanted.chat else None,
            seed=spec.seed,
        )
        return {
            "harness": {"name": "lm-evaluation-harness", "version": harness.version(harness.PACKAGE)},
            "benchmarks": harness.run(wanted, lm, spec.run_dir, known, told),
        }


@contextmanager
def _served(port: int) -> Iterator[Metrics]:
    """Metrics on that port; on none if it is taken, as by a run that trains meanwhile."""
    try:
        metrics = Metrics(rank=0, port=port)
    except SpecError as error:
        log.warning("the evaluation serves no metrics: %s", error)
        metrics = Metrics(rank=0, port=0)
    try:
        yield metrics
        metrics.await_scrape()
    finally:
        metrics.close()
