"""Held-out evaluation of a run's newest checkpoint: bits per byte by domain and source, and samples.

The definition of bits per byte is in trainer/scoring.py.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from trainer import gate
from trainer.begin import begun_with
from trainer.data.chattemplate import Asking
from trainer.distributed import pick_device
from trainer.evaluatespec import measured
from trainer.evaluation import measure
from trainer.evaluation.refused import refuse
from trainer.evaluation.scores import rows
from trainer.generate import complete
from trainer.precision import device_capability, resolve_for_evaluation
from trainer.proof.start import remember
from trainer.recording.exporter import Metrics
from trainer.recording.trackers.remote import tell
from trainer.report import REPORT, update_report
from trainer.scoring import Score, score_sources
from trainer.spec import TrainSpec
from trainer.trained import load_trained

log = logging.getLogger(__name__)


def run(spec: TrainSpec) -> dict[str, Any]:
    """Evaluate the newest checkpoint of the run; writes run_dir/eval.json and the report, and returns what it wrote.

    Raises:
        LaunchError, CheckpointError: no checkpoint, or none that verifies.
        DataError: held-out data is missing or damaged.
        SpecError: this device cannot run the spec, or benchmarks are not as they must be.
    """
    refuse(spec.evaluate)
    with measure.served(spec) as metrics:
        return _run(spec, metrics)


def _run(spec: TrainSpec, metrics: Metrics) -> dict[str, Any]:
    began = time.monotonic()
    device = pick_device(spec.runtime.device)
    if spec.runtime.prove:
        remember(device, spec.run_dir)
    precision = resolve_for_evaluation(spec.precision, device_capability(device))
    trained = load_trained(spec, device, precision.autocast_dtype)
    heldout = score_sources(spec, trained.model, trained.tokenizer, device, precision)
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
    by_domain = heldout.by_domain()
    result = {
        "run": spec.run,
        "step": trained.checkpoint.step,
        "checkpoint_digest": trained.checkpoint.digest,
        "settings": measured(spec.evaluate),
        "device": device.type,
        "precision": precision.name,
        "domains": {domain: score.summary() for domain, score in by_domain.items()},
        "sources": {
            source: {"domain": heldout.domain_of[source], **score.summary()}
            | ({"scored": "answers"} if source in heldout.of_answers else {})
            for source, score in heldout.scores.items()
        },
        "all": sum(heldout.scores.values(), Score()).summary(),
        "samples": [{"prompt": p, "text": t} for p, t in zip(spec.evaluate.prompts, texts, strict=True)],
    }
    result |= measure.measure(spec, trained, device, precision, metrics)
    tokenizer = trained.tokenizer
    del trained  # one model in memory is enough
    if spec.init_from and (before := begun_with(spec, device, precision.autocast_dtype)) is not None:
        scores = score_sources(spec, before, tokenizer, device, precision).by_domain()
        domains = {domain: score.summary() for domain, score in scores.items()}
        result["begun_with"] = {"model": spec.init_from, "domains": domains}
    result["seconds"] = round(time.monotonic() - began, 3)
    if gates := gate.results(spec, result):
        result["gates"] = gates
    update_report(spec.run_dir, result)
    gate.write(Path(spec.run_dir) / gate.EVALUATION, result)  # last: it declares the task finished
    tell_trackers(spec, result)
    for domain, score in by_domain.items():
        log.info("%s: %.4f bits per byte over %d tokens", domain, score.summary()["bits_per_byte"], score.tokens)
    for found in gates:
        log.log(logging.INFO if found["passed"] else logging.WARNING, "gate: %s", found["sentence"])
    return result


def tell_trackers(spec: TrainSpec, result: dict[str, Any]) -> None:
    """Scores by domain, benchmarks and gates, without texts, if the run has trackers."""
    scores = {
        "step": result["step"],
        "heldout": {name: domain["bits_per_byte"] for name, domain in result["domains"].items()},
        **({"benchmarks": {row.name: row.value for row in benchmarks}} if (benchmarks := rows(result)) else {}),
        "gates_failed": sum(not found["passed"] for found in result.get("gates", [])),
        "report": str(Path(spec.run_dir) / REPORT),
    }
    tell(spec, {"evaluation": scores}, {"evaluation": scores, "step": result["step"]})
