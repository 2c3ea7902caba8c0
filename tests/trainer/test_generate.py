"""Sampling against a plain greedy loop and against models whose distribution is known."""

from types import SimpleNamespace

import pytest
import torch
from made_run import make_run
from torch import nn

from trainer.data.tokenizer import Tokenizer
from trainer.generate import complete, generate

STOP = 0


class Chain(nn.Module):
    """Logits that depend only on the last id: row `id` of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))

    def forward(self, ids_BT, seq_idx_BT, labels_BT=None):
        assert ids_BT.shape == seq_idx_BT.shape
        return SimpleNamespace(logits_BTV=self.table[ids_BT])


def counting(size):
    """After n comes n + 1; after the last comes 0."""
    table = torch.zeros(size, size)
    for n in range(size):
        table[n, (n + 1) % size] = 9
    return Chain(table)


def test_stops_at_the_end_of_document_and_at_the_limit():
    out = generate(counting(8), [[5], [1], [2, 6]], max_tokens=4, temperature=0, seed=0, stops={STOP})
    assert out == [[6, 7], [2, 3, 4, 5], [7]]


def test_temperature_is_applied():
    """p ∝ exp(logit / T): 4 × as likely at T = 1 is 2 × at T = 2 and 16 × at T = ½."""
    table = torch.full((3, 3), -1e9)
    table[:, 1], table[:, 2] = torch.log(torch.tensor(4.0)), 0.0
    for temperature, odds in ((1.0, 4), (2.0, 2), (0.5, 16)):
        out = generate(Chain(table), [[1]] * 2000, max_tokens=1, temperature=temperature, seed=1, stops={STOP})
        share, expected = out.count([1]) / len(out), odds / (odds + 1)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(out)) ** 0.5


def test_a_prompt_draws_the_same_whatever_runs_beside_it():
    model = Chain(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 5, "stops": {-1}}
    alone = generate(model, [[3]], **options)
    beside = generate(model, [[3], [4, 5, 6]], **options)
    assert alone[0] == beside[0]
    assert beside[1] != generate(model, [[3], [4, 5, 6]], **{**options, "seed": 6})[1]


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        generate(counting(4), [[1], []], max_tokens=1, temperature=0, seed=0, stops={STOP})


def test_real_model_is_greedy_at_temperature_zero(tmp_path):
    """Prompts of different length in one padded batch: each as if it ran alone, without padding."""
    spec, model = make_run(tmp_path)
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    prompts = ["river", "다리 강물 stone moon river light", "x"]
    texts = complete(model, tokenizer, prompts, max_tokens=12, temperature=0, seed=0)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer.encode(prompt)
        length = len(ids)
        for _ in range(12):
            row = torch.tensor([ids])
            with torch.no_grad():
                token = int(model(row, torch.zeros_like(row, dtype=torch.int32)).logits_BTV[0, -1].argmax())
            if token == tokenizer.eod_id:
                break
            ids.append(token)
        assert text == tokenizer.decode_part(ids[length:])
