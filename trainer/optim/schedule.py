"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore, any step may be asked.

WSD (warm-up, stable, decay; arXiv 2404.06395) is the default: the stable part is the same for every length of a run, so
a run can be lengthened from a checkpoint before the decay.
"""

from __future__ import annotations

import math
from typing import Literal

from trainer.spec import ScheduleSpec


def learning_rate_factor(
    step: int, steps: int, spec: ScheduleSpec, peak: float, begun_with_steps: int | None = None
) -> float:
    """What multiplies every group's learning rate at `step` (0 is the first) of `steps`.

    Warm-up over W = round(warmup_fraction·steps) steps: with r = (step+1)/W, r or (1−cos πr)/2, so the first step
    already moves and step W−1 has the peak. A decay takes max(1, round(decay_fraction·steps)) steps with WSD and all
    after the warm-up with cosine and linear; the run's last step, unless it still warms up, has exactly
    `final_learning_rate` / `peak`, which later steps keep. WSD with decay_fraction 0 and constant never leave the peak.

    Args:
        peak: learning rate at factor 1, to which `final_learning_rate` is related.
        begun_with_steps: the first length, which sets the warm-up, if the run's length was changed.
    """
    warmup, decay = spec.phases(steps, begun_with_steps)
    if step < warmup:
        return 1 - _remaining((step + 1) / warmup, spec.warmup_shape)
    if not decay or spec.name == "constant":
        return 1.0
    shape = spec.decay_shape if spec.name == "wsd" else spec.name
    done = step + 1 - (steps - decay)
    if done <= 0:
        return 1.0
    final = spec.final_learning_rate / peak
    return final + (1 - final) * _remaining(min(1.0, done / decay), shape)


def _remaining(progress: float, shape: Literal["linear", "cosine", "sqrt"]) -> float:
    """1 at progress 0, 0 at progress 1."""
    if shape == "linear":
        return 1 - progress
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - math.sqrt(progress)
