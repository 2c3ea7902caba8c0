"""Reads the lines that Megatron-LM prints: a step, a validation, a finished checkpoint.

Formats: training_log and evaluate_and_print_results of megatron/training/training.py, save_checkpoint of
checkpointing.py, core 0.12 (0.8 and later print the same). The last rank prints steps, the first one checkpoints.
Imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_STEP = re.compile(r"^\s*(?:\[[\d :-]+\]\s*)?iteration\s+(?P<step>\d+)/\s*(?P<steps>\d+) \|(?P<rest>.*)$")
_VALIDATION = re.compile(r"^\s*validation loss at iteration (?P<step>\d+)\b[^|]*\|(?P<rest>.*)$")
_SAVED = re.compile(r"^\s*successfully saved checkpoint from iteration\s+(?P<step>\d+) to ")
_LOSS, _SKIPPED, _NAN = "lm loss", "number of skipped iterations", "number of nan iterations"
_SECONDS, _RATE, _NORM = "elapsed time per iteration (ms)", "learning rate", "grad norm"
# Values of a line that are no loss.
_KNOWN = {
    _SECONDS, _RATE, _NORM, _SKIPPED, _NAN, "consumed samples", "skipped samples", "global batch size", "loss scale",
    "throughput per GPU (TFLOP/s/GPU)", "decoupled learning rate", "num zeros", "params norm",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One iteration.

    Attributes:
        loss, grad_norm: NaN if the line has none, as of a step that was skipped.
        others: further losses by Megatron's name, such as load_balancing_loss.
        skipped: the update was left out, or the loss was not a number.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    others: dict[str, float]
    skipped: bool


@dataclass(frozen=True)
class Validated:
    """Mean loss over held-out rows after a step, in nats for each token."""

    step: int
    loss: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint of this step is complete."""

    step: int


Event = Step | Validated | Saved


def read(line: str) -> Event | None:
    """What a line says; None for any other line."""
    if match := _STEP.match(line):
        values = _values(match["rest"])
        if _SECONDS not in values:
            return None
        return Step(
            step=int(match["step"]),
            loss=values.get(_LOSS, math.nan),
            grad_norm=values.get(_NORM, math.nan),
            learning_rate=values.get(_RATE, math.nan),
            seconds=values[_SECONDS] / 1000,
            others={name: value for name, value in values.items() if name != _LOSS and name not in _KNOWN},
            skipped=bool(values.get(_SKIPPED) or values.get(_NAN)),
        )
    if match := _VALIDATION.match(line):
        return Validated(int(match["step"]), _values(match["rest"]).get(f"{_LOSS} value", math.nan))
    if match := _SAVED.match(line):
        return Saved(int(match["step"]))
    return None


def _values(text: str) -> dict[str, float]:
    """`name: number | …` as a mapping; parts that are something else are left out."""
    found = {}
    for part in text.split("|"):
        name, colon, value = part.rpartition(":")
        try:
            if colon:
                found[name.strip()] = float(value)
        except ValueError:
            continue
    return found
