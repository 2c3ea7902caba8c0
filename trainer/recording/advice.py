"""Advice from the recorded numbers of a run, one line each: for `yaongi status`, the report and the log.

Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.recording.collapse import collapse, synthetic_sources
from trainer.spec import TrainSpec

WINDOW, FEWEST = 500, 100  # steps that are looked at, and that must be there
CLIPPED_SHARE = 0.5
MARK = "advice: "  # before an advice in the log, by which a machine without the files finds it


def advice(
    records: Iterable[Mapping[str, Any]], spec: TrainSpec, validations: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """What the numbers suggest to change; empty if nothing.

    Args:
        records: lines of metrics.jsonl in order, at least the last WINDOW.
        validations: all lines of validation.jsonl in order.
    """
    warmup, _ = spec.schedule.phases(spec.steps, spec.begun_with_steps)
    last = [line for line in records if line["step"] > warmup and not line.get("skipped")][-WINDOW:]
    found = [_clipping(last, spec)] if len(last) >= FEWEST else []
    if validations:
        found.append(collapse(validations, synthetic_sources(spec.run_dir)))
    return [each for each in found if each]


def _clipping(last: list[Mapping[str, Any]], spec: TrainSpec) -> str | None:
    """A threshold that most steps reach no longer guards against the rare large gradient: it rescales all of them."""
    clip, share = spec.optimizer.clip_norm, sum(bool(line.get("clipped")) for line in last) / len(last)
    norms = [norm for line in last if (norm := line.get("grad_norm")) is not None]
    if clip is None or share < CLIPPED_SHARE or not norms:
        return None
    name = "adamw" if spec.model.lora else spec.optimizer.name
    return (
        f"clipped in {share:.0%} of the last {len(last)} steps (median gradient norm {statistics.median(norms):.3g}, "
        f"clip_norm {clip:g}): lower train.optimizer.{name}.learning_rate or raise train.optimizer.clip_norm"
    )
