"""Which steps must not change the weights: gradients that are not finite, and spikes of loss or gradient norm.

A step is a spike when its loss or gradient norm exceeds the mean of the steps before it by `sigmas` standard deviations
(as OLMo-core's SkipStep optimizers do). Spikes are remembered like every other step. So a lasting rise, say from other
data, is skipped a few times only, until the window has become wide enough for it: window/(1 + sigmas²) times at most,
rounded up, which is 4 at 6σ and 128 steps.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import mean, pstdev
from typing import Literal, get_args

from trainer.spec import SpikeGuardSpec

SkipReason = Literal["nonfinite", "loss_spike", "gradient_spike"]
SKIP_REASONS: tuple[SkipReason, ...] = get_args(SkipReason)
_PREFIX = "spike_guard."


class SpikeGuard:
    """The last steps' losses and gradient norms. Without a spec it only refuses what is not finite."""

    def __init__(self, spec: SpikeGuardSpec | None) -> None:
        self._spec = spec
        length = spec.window if spec else 0
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=length) for name in ("loss", "gradient")}

    def judge(self, loss: float, grad_norm: float) -> SkipReason | None:
        """Why this step is to be skipped, None when it is sound; it is remembered in either case if it is finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nonfinite"
        reason: SkipReason | None = None
        if self._spikes("gradient", grad_norm):
            reason = "gradient_spike"
        if self._spikes("loss", loss):
            reason = "loss_spike"
        self._recent["loss"].append(loss)
        self._recent["gradient"].append(grad_norm)
        return reason

    def _spikes(self, name: str, value: float) -> bool:
        recent = self._recent[name]
        if self._spec is None or len(recent) < self._spec.window // 2:
            return False
        # `fmean` of equal values may lie a rounding below them, `mean` is exact.
        return value > mean(recent) + self._spec.sigmas * pstdev(recent)

    def state(self) -> dict[str, float]:
        """For the scalars of a checkpoint."""
        return {
            f"{_PREFIX}{name}.{place}": value
            for name, recent in self._recent.items()
            for place, value in enumerate(recent)
        }

    def load(self, scalars: dict[str, float]) -> None:
        """Take over the `state` in a checkpoint's scalars; of a longer window the newest values."""
        for name, recent in self._recent.items():
            own = {key: value for key, value in scalars.items() if key.startswith(f"{_PREFIX}{name}.")}
            recent.clear()
            recent.extend(own[key] for key in sorted(own, key=lambda key: int(key.rpartition(".")[2])))
