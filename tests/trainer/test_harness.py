"""Benchmarks through our interface of lm-evaluation-harness, against its own HFLM on the exported model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from foreign_models import TEXTS, llama_tokenizer, qwen_tokenizer
from own_tasks import TASKS, make_tasks, sentences

from trainer.data import tokenizer as tokenizers
from trainer.data.chattemplate import Asking
from trainer.evaluation.lm import HarnessModel
from trainer.hf.architectures import native
from trainer.hf.folder import write
from trainer.hf.weights import tensors
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec

VOCAB, LONGEST = 320, 64
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden": 32,
    "layers": ["ME", "*-", "M"],
    "mamba": {"num_heads": 4, "head_dim": 8, "d_state": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32},
    "mlp": {"width": 64},
}


@pytest.fixture(scope="module")
def hflm():
    """The harness's own class for transformers. It imports accelerate, which it needs only for several processes, so
    that package is replaced by the few names; tests/peers has it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("accelerate") is None:
            stub, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
            for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
                setattr(stub, name, None)
            utils.get_max_memory = None
            patch.setitem(sys.modules, "accelerate", stub)
            patch.setitem(sys.modules, "accelerate.utils", utils)
        from lm_eval.models.huggingface import HFLM

        yield HFLM


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: tasks, and an export for transformers; also the same model and tokenizer."""
    place = tmp_path_factory.mktemp("harness")
    make_tasks(place)
    (place / "tokenizer").mkdir()
    tokenizers.save(tokenizers.train(sentences(200), VOCAB), place / "tokenizer")
    spec = ModelSpec.model_validate(MODEL)
    model = build_model(spec, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    architecture, _ = native(spec)
    assert architecture is not None
    named = tensors(architecture, spec, model.state_dict(), torch.float32)
    write(place / "export", architecture.config(spec, LONGEST), named, place / "tokenizer", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place, model.eval()


def evaluated(place: Path, lm: Any, **options: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=10, **options)
    assert found is not None
    return found


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_scores_are_those_of_the_harness_on_the_export(place, hflm, chat):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = place
    tokenizer, files = tokenizers.Tokenizer.load(folder / "tokenizer"), folder / "tokenizer"
    asking = Asking(files) if chat else None
    ours = HarnessModel(model, tokenizer, files, max_length=LONGEST, batch_tokens=200, asking=asking)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    theirs = hflm(loaded, tokenizer=AutoTokenizer.from_pretrained(folder / "export"), batch_size=4)
    assert theirs.max_length == LONGEST
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    options = {"apply_chat_template": True, "num_fewshot": 1} if chat else {}
    a, b = (evaluated(folder, lm, **options) for lm in (ours, theirs))
    for name in TASKS:
        numbers = [{k: v for k, v in x["results"][name].items() if isinstance(v, float)} for x in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6) and numbers[0]
        for mine, other in zip(a["samples"][name], b["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            if name == "own_writing":
                assert mine["resps"] == other["resps"]
            else:
                found, expected = (flat(sample["resps"]) for sample in (mine, other))
                assert found == pytest.approx(expected, rel=1e-6)
    written = [sample["resps"][0][0] for sample in a["samples"]["own_writing"]]
    assert any(len(text) > 20 for text in written) and (chat or len(set(written)) == 8)
    prompt = a["samples"]["own_choice"][2]["arguments"][0][0]
    assert prompt.count("<|im_start|>user") == (2 if chat else 0)


def flat(responses: list[list[Any]]) -> list[float]:
    return [float(value) for each in responses for one in each for value in (one if isinstance(one, tuple) else [one])]


def test_draws_of_one_question_differ_and_repeat(place):
    from lm_eval.api.instance import Instance

    folder, model = place
    tokenizer = tokenizers.Tokenizer.load(folder / "tokenizer")
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, ("river", options), n) for n in range(6)]
    lm = HarnessModel(model, tokenizer, folder / "tokenizer", max_length=LONGEST, batch_tokens=64)
    found = lm.generate_until(requests)
    assert len(set(found)) > 3
    assert lm.generate_until(requests[:2]) == found[:2]
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):  # only the likeliest token is left
        limited = [Instance("generate_until", {}, ("river", options | limit), n) for n in range(3)]
        greedy = Instance("generate_until", {}, ("river", {"do_sample": False, "max_gen_toks": 8}), 3)
        assert lm.generate_until([*limited, greedy]) == lm.generate_until([greedy]) * 4


def test_a_chat_is_written_as_the_exports_template_writes_it(place):
    from transformers import AutoTokenizer

    folder, model = place
    tokenizer = tokenizers.Tokenizer.load(folder / "tokenizer")
    asking = Asking(folder / "tokenizer")
    lm = HarnessModel(model, tokenizer, folder / "tokenizer", max_length=64, batch_tokens=64, asking=asking)
    theirs = AutoTokenizer.from_pretrained(folder / "export")
    chat = [
        {"role": "system", "content": "짧게 답해."},
        {"role": "user", "content": "river <|im_end|>?"},
        {"role": "assistant", "content": "<think>stone</think> 12"},
    ]
    for messages in (chat[:2], [*chat, chat[1]]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert lm.apply_chat_template(messages) == text
        assert lm.tok_encode(text) == theirs.encode(text) == asking.ids(messages)
    chat[2]["content"] = "stone 1"
    begun = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == begun


@pytest.mark.parametrize("make", [qwen_tokenizer, llama_tokenizer], ids=["qwen", "llama"])
def test_tokenizers_of_other_models_are_used_as_transformers_uses_them(place, hflm, tmp_path, make):
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = place
    named, own = make(tmp_path / "tokenizer"), tokenizers.Tokenizer.load(make(tmp_path / "tokenizer"))
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    theirs = hflm(loaded, tokenizer=AutoTokenizer.from_pretrained(named), batch_size=2)
    ours = HarnessModel(model, own, named, max_length=LONGEST, batch_tokens=200)
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    begin = own.decode(own.prefix)
    for text in ("The capital 서울", f"{begin}def add", " a<|im_end|>b<|eot_id|>"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    pairs = [("The capital of ", "Korea"), ("", "대한민국"), (f"{begin}def add(a, ", "b)"), ("return", " a + b")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert flat([found]) == pytest.approx(flat([expected]), rel=1e-6)
    texts = [Instance("loglikelihood_rolling", {}, ("".join(TEXTS[:5]),), 0)]
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-6)
