"""Texts that come, go and are cancelled at random, under random limits, are those that each would be alone."""

from __future__ import annotations

import random

import pytest
from test_inference_engine import model  # noqa: F401

from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.inference.text import Text
from trainer.model.hybrid import HybridModel

Job = tuple[list[int], Sampling]
LENGTH = 62  # of the longest text


def alone(model: HybridModel, prompt: list[int], sampling: Sampling) -> Text:  # noqa: F811
    engine = Engine(model, rows=1, length=LENGTH)
    text = engine.submit(prompt, sampling)
    engine.run()
    return text


@pytest.fixture(scope="module")
def jobs(model: HybridModel) -> list[tuple[Job, list[int]]]:  # noqa: F811
    """Prompts, how they go on, and their texts alone. Some end where the cache does."""
    rng, found = random.Random(0), []
    for seed in range(9):
        tokens = rng.choice([1, 2, 3, 8])
        prompt = [rng.randrange(60) for _ in range(rng.choice([1, 2, 20, LENGTH - tokens]))]
        sampling = Sampling(tokens, rng.choice([0.0, 0.0, 1.0]), seed=seed, repetition_penalty=rng.choice([1.0, 1.3]))
        found.append(((prompt, sampling), alone(model, prompt, sampling).made))
    assert sum(len(prompt) + sampling.max_tokens == LENGTH for (prompt, sampling), _ in found) > 1
    return found


@pytest.mark.parametrize("seed", range(8))
def test_texts_are_as_alone(model: HybridModel, jobs: list[tuple[Job, list[int]]], seed: int) -> None:  # noqa: F811
    rng = random.Random(seed)
    waiting = rng.sample(jobs, len(jobs))
    engine = Engine(
        model, rows=rng.choice([2, 3, 5]), length=LENGTH, drafts=seed % 2 == 1, prefill_tokens=rng.choice([5, 17, 40])
    )
    texts: list[tuple[Text, list[int]]] = []
    to_cancel: dict[int, Text] = {}  # by pass
    passes = 0
    while waiting or engine.busy:
        while waiting and rng.random() < 0.6:
            job, expected = waiting.pop()
            texts.append((engine.submit(*job), expected))
            if rng.random() < 0.2:
                to_cancel[passes + rng.randrange(6)] = texts[-1][0]
        if passes in to_cancel:
            to_cancel[passes].cancel()
        engine.step()
        passes += 1
    assert engine.running == 0
    for text, expected in texts:
        if text.ended == "cancelled":
            assert text.made == expected[: len(text.made)]
        else:
            assert (text.made, text.ended) == (expected, "length")


@pytest.mark.parametrize("drafts", [False, True])
def test_padding_does_not_reach_beyond_the_cache(model: HybridModel, drafts: bool) -> None:  # noqa: F811
    """The end of a long prompt is read beside a short prompt of which more tokens are left."""
    engine = Engine(model, rows=2, length=LENGTH, drafts=drafts, prefill_tokens=50)
    long, short = [1 + i % 50 for i in range(LENGTH - 1)], [2 + i % 40 for i in range(25)]
    first = engine.submit(long, Sampling(max_tokens=1))
    engine.step()
    second = engine.submit(short, Sampling(max_tokens=5))
    engine.run()
    assert len(first.made) == 1 and second.made == alone(model, short, Sampling(max_tokens=5)).made
