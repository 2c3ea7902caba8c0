"""Generation for benchmarks: batches of prompts of which each may end at its own place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from trainer.generate import generate
from trainer.model.hybrid import HybridModel

LOOK_TOKENS = 32  # after so many, look whether a text has ended


def write(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int],
    ended: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
    """New ids of each prompt: at most `max_tokens`, without the id of `stops` that ended it; up to LOOK_TOKENS more
    than those with which `ended` became true."""
    made: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for first in range(0, max_tokens, LOOK_TOKENS):
        if not running:
            break
        amount = min(LOOK_TOKENS, max_tokens - first)
        parts = generate(
            model,
            [[*prompts[i], *made[i]] for i in running],
            max_tokens=amount,
            temperature=temperature,
            seed=seed + 1_000_003 * first,
            stops=stops,
        )
        for i, part in zip(running, parts, strict=True):
            made[i] += part
        running = [i for i, part in zip(running, parts, strict=True) if len(part) == amount and not ended(made[i])]
    return made
