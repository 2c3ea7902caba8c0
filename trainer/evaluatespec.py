"""What is measured of a trained model: the section `evaluate` of `train`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field

from trainer.benchmarkspec import BenchmarksSpec
from trainer.fields import stored
from trainer.gatespec import GateSpec
from trainer.kinds.base import Count
from trainer.specbase import begins_with


@begins_with("max_tokens", "prompts", "sample_tokens", "temperature", "chat")
class EvaluateSpec(BenchmarksSpec):
    """Held-out evaluation: at most `max_tokens` tokens of each domain, and one generated sample per prompt.

    `chat`: the prompts are asked as questions of a chat, also those of benchmarks. `every_steps`: also during training,
    every so many steps and after the last, of `every_max_tokens` tokens of each domain. `gate`: what must hold for the
    model to be exported. The other fields are benchmarks (trainer/benchmarkspec.py).
    """

    max_tokens: Count = 200_000
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    sample_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    chat: bool = False
    every_steps: Count | None = None
    every_max_tokens: Count = 20_000
    gate: list[GateSpec] = []

    def beside(self, folder: str) -> Self:
        """The same, with relative paths that start in `folder`."""
        return super().beside(folder).model_copy(update={"gate": [gate.beside(folder) for gate in self.gate]})


# Fields that change nothing of what is measured of the finished model.
_BESIDE = frozenset({"every_steps", "every_max_tokens", "gate"})


def measured(spec: EvaluateSpec) -> dict[str, Any]:
    """The settings on which the contents of eval.json depend; with others, the model is evaluated again."""
    settings: dict[str, Any] = stored(spec, without=_BESIDE)
    return settings
