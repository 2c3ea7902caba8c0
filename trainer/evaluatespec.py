"""What is measured of a trained model: the section `evaluate` of `train`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.kinds.base import Count
from trainer.specbase import Spec


class EvaluateSpec(Spec):
    """Held-out evaluation: at most `max_tokens` tokens of each domain, and one generated sample per prompt.

    `chat`: the prompts are asked as questions of a chat.
    """

    max_tokens: Count = 200_000
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    sample_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    chat: bool = False
