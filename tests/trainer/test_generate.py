"""Continuing prompts with a run's model, against a plain greedy loop. The engine has tests of its own."""

import pytest
import torch
from made_run import make_run

from trainer.data.tokenizer import Tokenizer
from trainer.generate import complete, generate


def test_empty_prompt_is_refused(tmp_path):
    _, model = make_run(tmp_path)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        generate(model, [[1], []], max_tokens=1, temperature=0, seed=0, stops={0})
    assert generate(model, [], max_tokens=1, temperature=0, seed=0, stops={0}) == []


def test_each_prompt_has_its_own_seed(tmp_path):
    _, model = make_run(tmp_path)
    options = {"max_tokens": 20, "temperature": 1.0, "stops": {-1}}
    both = generate(model, [[3], [3]], seed=5, **options)
    assert both == [generate(model, [[3]], seed=seed, **options)[0] for seed in (5, 6)] and both[0] != both[1]


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
