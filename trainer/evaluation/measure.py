"""The benchmarks of one checkpoint, as `train.evaluate` asks for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.data.chattemplate import Asking
from trainer.errors import DataError, ForeseenError, SpecError
from trainer.evaluation import harness, logickor
from trainer.evaluation.scores import LOGICKOR, of_task
from trainer.evaluation.tasks import PACKAGE, TASK_FILES, files_digest
from trainer.evaluation.write import Autocast, Writer, stops
from trainer.precision import Precision
from trainer.recording.exporter import Metrics
from trainer.spec import TrainSpec
from trainer.trained import Trained

log = logging.getLogger(__name__)


def measure(
    spec: TrainSpec, trained: Trained, device: torch.device, precision: Precision, metrics: Metrics
) -> dict[str, Any]:
    """What eval.json says of benchmarks; empty without any. The scores become metrics as soon as they are there.

    Raises:
        LaunchError, DataError: as `harness.run` and `logickor.run`. What was measured before is kept.
    """
    wanted, found, failed = spec.evaluate, dict[str, Any](), list[ForeseenError]()
    if not wanted.has_benchmarks:
        return {}
    longest = max(spec.tokens.seq_lens)
    known = {
        "checkpoint": trained.checkpoint.digest,
        "precision": precision.name,
        "max_length": longest,
        "chat": wanted.chat,
        "seed": spec.seed,
    }

    def autocast() -> AbstractContextManager[Any]:
        return precision.autocast(device.type)

    def told(task: str, scores: dict[str, Any]) -> None:
        for row in of_task(task, scores):
            metrics.set("benchmark_score", row.value, task=row.task, metric=row.metric)
            log.info("%s: %s %s", row.task, row.metric, row.text)

    if wanted.benchmarks:
        try:
            scores = _harness(spec, trained, autocast, known, told)
            name = {"name": "lm-evaluation-harness", "version": version(PACKAGE)}
            found |= {"harness": name, "benchmarks": scores}
            if wanted.task_files is not None:
                found[TASK_FILES] = files_digest(wanted.task_files)
        except ForeseenError as error:
            failed.append(error)
    if wanted.judge is not None:
        answer = _answerer(spec, trained, longest, autocast)
        found[LOGICKOR] = logickor.run(wanted.judge, answer, spec.run_dir, known)
        told(LOGICKOR, found[LOGICKOR])
    if failed:
        raise failed[0]
    return found


def _harness(
    spec: TrainSpec, trained: Trained, autocast: Autocast, known: dict[str, Any], told: Callable[..., None]
) -> dict[str, Any]:
    from trainer.evaluation.lm import HarnessModel

    lm = HarnessModel(
        trained.model,
        trained.tokenizer,
        spec.tokens.tokenizer,
        max_length=known["max_length"],
        batch_tokens=spec.evaluation_rows * spec.tokens.seq_len,
        autocast=autocast,
        asking=Asking(spec.tokens.tokenizer) if spec.evaluate.chat else None,
        seed=spec.seed,
    )
    return harness.run(spec.evaluate, lm, spec.run_dir, known, told)


def _answerer(spec: TrainSpec, trained: Trained, longest: int, autocast: Autocast) -> logickor.Write:
    """Answers conversations with the chat template, greedily. One that is too long loses its beginning."""
    assert spec.evaluate.judge is not None
    amount, asking = spec.evaluate.judge.max_tokens, Asking(spec.tokens.tokenizer)
    if (room := longest - amount) <= 0:
        raise DataError(
            f"train.evaluate.judge.max_tokens {amount} leaves no room for a question, as the model reads {longest} "
            "tokens; lower it, or train with longer rows (train.seq_len)"
        )
    ends = stops(Path(spec.tokens.tokenizer), trained.tokenizer, asking)
    writer = Writer(trained.model, trained.tokenizer, ends, autocast)

    def answer(talks: list[logickor.Messages]) -> list[str]:
        prompts = [asking.ids(talk) for talk in talks]
        if cut := sum(len(prompt) > room for prompt in prompts):
            log.warning("logickor: %d questions are longer than %d tokens and lose their beginning", cut, room)
        return [text.strip() for text in writer([prompt[-room:] for prompt in prompts], max_tokens=amount)]

    return answer


@contextmanager
def served(spec: TrainSpec) -> Iterator[Metrics]:
    """The metrics of an evaluation until it ends, as Prometheus would take a process that stops serving for a hanging
    one. On no port without benchmarks, or if the port is taken, as by a run that trains meanwhile."""
    port = spec.runtime.metrics_port if spec.evaluate.has_benchmarks else 0
    try:
        metrics = Metrics(rank=0, port=port, process="evaluation")
    except SpecError as error:
        log.warning("the evaluation serves no metrics: %s", error)
        metrics = Metrics(rank=0, port=0, process="evaluation")
    try:
        yield metrics
        metrics.await_scrape()
    finally:
        metrics.close()
