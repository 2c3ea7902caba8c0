"""The filters against transformers', the draws against their distribution, and texts byte by byte."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.data.tokenizer import Tokenizer
from trainer.errors import CheckpointError, SpecError
from trainer.inference.sampling import Sampling, choose, penalised, probabilities
from trainer.inference.text import Decoder, Text

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.8),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=0.9, min_p=0.2),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=1000),
]


def of_transformers(sampling: Sampling) -> LogitsProcessorList:
    found = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(found)


def test_filters_are_those_of_transformers() -> None:
    """Alone and all together in one batch."""
    logits_BV = torch.randn(len(SAMPLINGS), 50, generator=torch.Generator().manual_seed(1)) * 3
    p_BV = probabilities(logits_BV, SAMPLINGS)
    for row, sampling in enumerate(SAMPLINGS):
        expected_BV = of_transformers(sampling)(None, logits_BV[row : row + 1].clone()).softmax(-1)
        torch.testing.assert_close(p_BV[row : row + 1], expected_BV)
        torch.testing.assert_close(probabilities(logits_BV[row : row + 1], [sampling]), expected_BV)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits_V, ids = torch.randn(30, generator=torch.Generator().manual_seed(2)), [3, 3, 7, 29]
    expected_1V = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits_V[None].clone())
    torch.testing.assert_close(penalised(logits_V, ids, 1.3)[None], expected_1V)


def test_draws_follow_the_distribution() -> None:
    """Odds of 4 : 1 become 2 : 1 at temperature 2 and 16 : 1 at ½."""
    logits_BV = torch.tensor([-1e9, 1.3862944, 0.0]).repeat(2000, 1)
    for temperature, odds in ((1.0, 4), (2.0, 2), (0.5, 16)):
        samplings = [Sampling(temperature=temperature)] * 2000
        generators = [torch.Generator().manual_seed(n) for n in range(2000)]
        drawn = choose(logits_BV.clone(), samplings, [[1]] * 2000, generators)
        share, expected = drawn.count(1) / 2000, odds / (odds + 1)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_greedy_and_drawn_texts_in_one_batch() -> None:
    logits_BV = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, -1e9], [9.0, 10.0, 0.0]])
    samplings = [Sampling(), Sampling(temperature=1e-3), Sampling(repetition_penalty=2.0)]
    assert choose(logits_BV, samplings, [[0], [0], [1]], [torch.Generator()] * 3) == [1, 1, 0]


def test_a_temperature_that_fp32_cannot_divide_by_is_greedy() -> None:
    logits_BV = torch.tensor([[0.0, 50.0, 49.9]])
    assert choose(logits_BV, [Sampling(temperature=1e-40)], [[0]], [torch.Generator()]) == [1]
    assert Sampling(temperature=1e-40).greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_is_refused(temperature: float) -> None:
    logits_BV = torch.tensor([[0.0, 1.0], [0.0, float("nan")]])
    with pytest.raises(CheckpointError, match="logits are NaN"):
        choose(logits_BV, [Sampling(temperature=temperature)] * 2, [[0]] * 2, [torch.Generator()] * 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"stop": ("a", "")}, "without empty strings"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number of at most 64 bits"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(SpecError, match=says.replace("(", r"\(")):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def tokenizer(micro_data) -> Tokenizer:
    return Tokenizer.load(micro_data / "tokenizer")


def single_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """The bytes of a text as one token each."""
    return [token for byte in text.encode() for token in tokenizer.encode_bytes(bytes([byte]))]


def test_characters_appear_once_they_are_complete(tokenizer: Tokenizer) -> None:
    decoder, text = Decoder(tokenizer), "강 a🌊"
    pieces = [decoder.push(token) for token in single_bytes(tokenizer, text)]
    assert pieces == ["", "", "강", " ", "a", "", "", "", "🌊"]
    decoder = Decoder(tokenizer)
    ids = single_bytes(tokenizer, text)[1:-1]  # begins and ends inside a character
    assert "".join(map(decoder.push, ids)) == " a" == tokenizer.decode_part(ids)
    decoder = Decoder(tokenizer)
    ids = single_bytes(tokenizer, "a") + tokenizer.encode_bytes(b"\xff") + single_bytes(tokenizer, "b")
    assert "".join(map(decoder.push, ids)) == "a\ufffdb"


def test_a_stop_string_is_never_shown_and_ends_the_text(tokenizer: Tokenizer) -> None:
    """It may come in any pieces; what only looks like its beginning is shown once it is not."""
    sampling = Sampling(max_tokens=100, stop=("끝.", "\n\n###"))
    for written, shown in (("하나\n\n##끝.더", "하나\n\n##"), ("a\n\n###b", "a"), ("끝 a\n", "끝 a\n")):
        text, seen = Text([1], sampling, tokenizer), ""
        for token in single_bytes(tokenizer, written):
            if text.ended is None:
                text.push(token)
            assert text.text.startswith(seen) and shown.startswith(text.text)
            seen = text.text
        if written != shown:
            assert text.ended == "stop"
        else:
            text.cancel()  # what was held back is part of it after all
        assert text.text == shown


def test_the_end_shows_what_was_held_back(tokenizer: Tokenizer) -> None:
    text = Text([1], Sampling(max_tokens=3, stop=("abcd",)), tokenizer)
    for token in single_bytes(tokenizer, "abc"):
        text.push(token)
    assert (text.text, text.ended) == ("abc", "length")
