"""lm_eval's command line on exported transformers folders gives the numbers of our models. `make test-peers`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data import tokenizer as tokenizers
from trainer.generate import generate
from trainer.hf import own
from trainer.hf.architectures import native
from trainer.hf.folder import write
from trainer.hf.weights import own_tensors, tensors
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
VOCAB = 320
WORDS = ["river", "stone", "다리", "moon", "강물", "light", "seven", "return", "바람", "12"]
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
DECODER = {"attention": {**ATTENTION, "qk_norm": True, "rope_theta": 1e4}}
MOE = {"num_experts": 4, "top_k": 2, "expert_width": 32}
SOFTMAX = {"activation": "swiglu", "scores": "softmax", "score_scale": 1.0, "bias_update_rate": 0.0}
HYBRID = {
    "mamba": {"num_heads": 4, "head_dim": 8, "d_state": 16, "num_groups": 2, "chunk_size": 16},
    "attention": ATTENTION,
    "moe": MOE,
    "mlp": {"width": 64},
}
ENGRAM = {"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2, "compress_tokens": False}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"layers": ["*-", "*-"], **DECODER, "mlp": {"width": 64, "activation": "swiglu"}},
    "qwen3_moe": {"layers": ["*E", "*E"], **DECODER, "moe": {**MOE, **SOFTMAX}},
    "nemotron_h": {"layers": ["ME", "*-", "M"], **HYBRID},
    "yaongi": {"layers": ["ME", "N", "*-"], **HYBRID, "engram": [ENGRAM]},
}
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["<|endoftext|>"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two tasks and a tokenizer; lm_eval's libraries read their cache folders when they are imported."""
    place, rng = tmp_path_factory.mktemp("lm-eval"), random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 40))) for _ in range(200)]
    (place / "tokenizer").mkdir()
    tokenizers.save(tokenizers.train(texts, VOCAB), place / "tokenizer")
    rows = [
        {"question": " ".join(text.split()[:9]), "choices": rng.sample(WORDS, 3), "answer": i % 3}
        for i, text in enumerate(texts[:8])
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "tasks").mkdir()
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (place / "tasks" / f"{name}.yaml").write_text(task.replace("FILE", str(place / "rows.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(place / "home"))
        yield place


def exported(name: str, place: Path) -> HybridModel:
    spec = ModelSpec.model_validate({"vocab_size": VOCAB, "hidden": 32, **MODELS[name]})
    model = build_model(spec, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    architecture, _ = native(spec)
    state, dtype = model.state_dict(), torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if architecture is None:
        config, named = own.config(spec, 64), own_tensors(state, dtype)
        options["code"] = own.CODE
    else:
        config, named = architecture.config(spec, 64), tensors(architecture, spec, state, dtype)
    assert config["model_type"] == name
    write(place / name, config, named, place / "tokenizer", **options)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_its_numbers_are_ours(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.__main__ import cli_evaluate

    model, tokenizer = exported(name, place), tokenizers.Tokenizer.load(place / "tokenizer")
    given = {"pretrained": place / name, "dtype": "float32", "trust_remote_code": name == "yaongi"}
    arguments = ["--model", "hf", "--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    arguments += ["--tasks", "local_choice,local_write", "--include_path", str(place / "tasks"), "--device", "cpu"]
    arguments += ["--batch_size", "4", "--log_samples", "--output_path", str(place / "out" / name)]
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", *arguments])
    cli_evaluate()

    samples = {task: read_samples(place / "out" / name, task) for task in ("local_choice", "local_write")}
    right = 0
    for sample in samples["local_choice"]:
        row = sample["doc"]
        expected = [loglikelihood(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, rel=1e-5)
        right += expected.index(max(expected)) == row["answer"]
    (results,) = (place / "out" / name).rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_choice"]["acc,none"] == right / 8

    for sample in samples["local_write"]:
        assert sample["resps"][0][0] == continuation(model, tokenizer, sample["doc"]["question"])


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 8
    return samples


def continuation(model: HybridModel, tokenizer: tokenizers.Tokenizer, prompt: str) -> str:
    """The most likely 12 tokens, or those before the end of the text or of a turn, without special ones."""
    (ids,) = generate(model, [tokenizer.encode(prompt)], max_tokens=12, temperature=0, seed=0, stops={0})
    (turn_ends,) = tokenizer.encode("<|im_end|>", specials=True)
    ids = ids[: ids.index(turn_ends)] if turn_ends in ids else ids
    lengths = tokenizer.byte_lengths()
    return tokenizer.decode([n for n in ids if lengths[n]])


def loglikelihood(model: HybridModel, tokenizer: tokenizers.Tokenizer, context: str, text: str) -> float:
    """Of a text after a context."""
    ids, before = torch.tensor([tokenizer.encode(context + text)]), len(tokenizer.encode(context))
    with torch.no_grad():
        logits_TV = model(ids, torch.zeros_like(ids, dtype=torch.int32)).logits_BTV[0].double()
    scores_T = logits_TV[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[before - 1 :, 0]
    assert len(scores_T) and not math.isclose(scores_T[0].item(), -math.log(VOCAB))
    return scores_T.sum().item()
