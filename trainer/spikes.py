"""Which steps to skip: those with non-finite gradients, and spikes of loss or gradient norm.

The reason `no_answers` is decided elsewhere (trainer/loop.py): a step without a trained token, where sources train on
answers only.

A step is a spike if its loss or gradient norm exceeds the mean of the previous steps by `sigmas` standard deviations
(as in OLMo-core's SkipStep optimizers). Spikes enter the window like every other step. So a lasting rise, for example
from other data, is skipped only a few times, until the standard deviation has grown: at most window/(1 + sigmas²)
times, rounded up, which is 4 at 6σ and 128 steps.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Literal, get_args

from trainer.spec import SpikeGuardSpec

SkipReason = Literal["nonfinite", "loss_spike", "gradient_spike", "no_answers"]
SKIP_REASONS: tuple[SkipReason, ...] = get_args(SkipReason)
_PREFIX = "spike_guard."


@dataclass(frozen=True)
class Limits:
    """Above them a value is a spike; infinite where nothing is."""

    loss: float
    grad_norm: float


class SpikeGuard:
    """The losses and gradient norms of the last steps. Without a spec it rejects only non-finite values.

    The limits of a step follow from the steps before it, so they are known before the step's own numbers, which the
    device compares with them (`why_skipped` in trainer/outcome.py).
    """

    def __init__(self, spec: SpikeGuardSpec | None) -> None:
        self._spec = spec
        length = spec.window if spec else 0
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=length) for name in ("loss", "gradient")}

    def limits(self) -> Limits:
        """Those of the next step."""
        return Limits(self._limit("loss"), self._limit("gradient"))

    def _limit(self, name: str) -> float:
        recent = self._recent[name]
        if self._spec is None or len(recent) < self._spec.window // 2:
            return math.inf
        # `fmean` of equal values may be a rounding below them, `mean` is exact.
        return mean(recent) + self._spec.sigmas * pstdev(recent)

    def enter(self, loss: float, grad_norm: float) -> None:
        """Take a step into the window, skipped or not, if both values are finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._recent["loss"].append(loss)
            self._recent["gradient"].append(grad_norm)

    def state(self) -> dict[str, float]:
        """The state for a checkpoint's scalars."""
        return {
            f"{_PREFIX}{name}.{place}": value
            for name, recent in self._recent.items()
            for place, value in enumerate(recent)
        }

    def load(self, scalars: dict[str, float]) -> None:
        """Load `state` from a checkpoint's scalars; only the newest values of a longer window."""
        for name, recent in self._recent.items():
            own = {key: value for key, value in scalars.items() if key.startswith(f"{_PREFIX}{name}.")}
            recent.clear()
            recent.extend(own[key] for key in sorted(own, key=lambda key: int(key.rpartition(".")[2])))
