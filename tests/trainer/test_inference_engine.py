"""Texts that are continued together are those that each would be alone, whenever they join and leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_inference_cache import BASE, ENGRAM
from transformers import AutoModelForCausalLM

from trainer.errors import SpecError
from trainer.hf.architectures import native
from trainer.hf.weights import tensors
from trainer.inference import memory
from trainer.inference.cache import Cache
from trainer.inference.engine import Engine
from trainer.inference.memory import check, fitting_rows, needed
from trainer.inference.sampling import Sampling
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Documents

GREEDY = Sampling(max_tokens=12)
PROMPTS = [[3], list(range(1, 40)), [9, 8, 7], [5] * 17, list(range(20, 64)), [11, 12]]


@pytest.fixture(scope="module")
def model() -> HybridModel:
    """Every kind of layer, and multi-token prediction with a layer of several kinds."""
    torch.manual_seed(0)
    layers = {"layers": ["ME", "*-", "N", "M*"], "engram": [{"layer": 2, **ENGRAM}], "mtp": {"depth": 1, "layer": "*M"}}
    model = build_model(ModelSpec.model_validate(BASE).updated(layers), seed=1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def greedy_by_whole_passes(model: HybridModel, prompt: list[int], tokens: int) -> list[int]:
    row = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids_BT = torch.tensor([row])
            row.append(int(model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model: HybridModel) -> list[list[int]]:
    return [greedy_by_whole_passes(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("prefill_tokens", [10, 2048])
def test_greedy_texts_are_those_of_whole_passes(
    model: HybridModel, expected: list[list[int]], rows: int, drafts: bool, prefill_tokens: int
) -> None:
    """With fewer rows than texts, prompts read in pieces, and proposals by multi-token prediction."""
    engine = Engine(model, rows=rows, length=60, drafts=drafts, prefill_tokens=prefill_tokens)
    texts = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    engine.run()
    assert [text.made for text in texts] == expected
    assert {text.ended for text in texts} == {"length"}
    assert (engine.proposed > 0) == drafts


@pytest.mark.parametrize("drafts", [False, True])
def test_texts_join_and_leave_at_any_time(model: HybridModel, expected: list[list[int]], drafts: bool) -> None:
    """Each text has its own length; they begin a pass apart; one ends at a token and one is cancelled."""
    engine = Engine(model, rows=3, length=60, drafts=drafts, prefill_tokens=16)
    lengths = [12, 3, 7, 1, 9, 5]
    texts = []
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        texts.append(engine.submit(prompt, Sampling(max_tokens=length)))
        engine.step()
    cancelled = engine.submit(PROMPTS[0], GREEDY)
    stop = expected[5][4]
    stopped = engine.submit(PROMPTS[5], replace(GREEDY, stop_ids=frozenset({stop})))
    while cancelled in engine.waiting or not cancelled.made:
        engine.step()
    cancelled.cancel()
    engine.run()
    for text, length, whole in zip(texts, lengths, expected, strict=True):
        assert (text.made, text.ended) == (whole[:length], "length")
    assert stopped.made == expected[5][: expected[5].index(stop)] and stopped.ended == "stop"
    assert cancelled.ended == "cancelled" and len(cancelled.made) < 12
    assert engine.running == 0


def test_right_proposals_save_passes(model: HybridModel) -> None:
    """A module that is always right: the text is the same, in half the passes."""
    engine = Engine(model, rows=2, length=60, drafts=True)
    tokens = greedy_by_whole_passes(model, PROMPTS[2], 30)
    real = engine.cache.draft

    def always_right(
        h_BTD: torch.Tensor, ids_BT: torch.Tensor, first: int, lengths: list, keep: list, *, last: bool
    ) -> torch.Tensor:
        logits_B1V = real(h_BTD, ids_BT, first, lengths, keep, last=last)
        assert logits_B1V.shape[1] == 1
        after = lengths[0] + keep[0] + 1 - len(PROMPTS[2])  # number of new tokens that are known
        logits_B1V[0, 0, [*tokens, 0, 0][after]] = 1e9
        return logits_B1V

    engine.cache.draft = always_right  # type: ignore[method-assign]
    text = engine.submit(PROMPTS[2], Sampling(max_tokens=30))
    engine.run()
    assert text.made == tokens
    assert engine.accepted == engine.proposed > 10 and engine.passes == 15


def test_proposals_are_those_of_the_module_in_training(model: HybridModel) -> None:
    ids_BT = torch.randint(0, 60, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cache = Cache(model, 2, 50, drafts=True)
        documents = Documents.one_per_row(2, 49)
        h_BTD, parts = cache.extend(ids_BT[:, :49], 0, [0, 0]), []
        for at, end in ((0, 20), (20, 21), (21, 49)):
            parts.append(cache.draft(h_BTD[:, at:end], ids_BT[:, at + 1 : end + 1], 0, [at, at], None))
        module, token_BTD = model.mtp[0], model.embedding(ids_BT[:, 1:])
        expected_BTD = module(h_BTD, token_BTD, ids_BT[:, :49], documents)[0]
        expected_BTV = model.head(module.head_norm(expected_BTD))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=0, atol=1e-4)


def test_what_is_drawn_depends_only_on_the_seed(model: HybridModel) -> None:
    drawn = Sampling(max_tokens=20, temperature=1.0, top_k=30, top_p=0.95, repetition_penalty=1.2)

    def texts(prompts: list[list[int]], seeds: list[int], **options: object) -> list[list[int]]:
        engine = Engine(model, rows=4, length=70, **options)
        made = [engine.submit(p, replace(drawn, seed=s)) for p, s in zip(prompts, seeds, strict=True)]
        engine.run()
        return [text.made for text in made]

    together = texts(PROMPTS, [5] * 6)
    assert together == texts(PROMPTS[::-1], [5] * 6)[::-1] == [texts([p], [5])[0] for p in PROMPTS]
    assert texts(PROMPTS[:1], [5], drafts=True) == together[:1]  # drawn texts get no proposals
    assert texts(PROMPTS[:1], [6]) != together[:1]


def test_logprobs_are_those_of_the_model(model: HybridModel, expected: list[list[int]]) -> None:
    engine = Engine(model, rows=2, length=60)
    text = engine.submit(PROMPTS[1], replace(GREEDY, logprobs=3, repetition_penalty=1.5))
    engine.submit(PROMPTS[2], GREEDY)
    engine.run()
    row = torch.tensor([text.ids])
    with torch.inference_mode():
        whole_TV = model(row, torch.zeros_like(row, dtype=torch.int32)).logits_BTV[0].log_softmax(-1)
    assert [found.token for found in text.logprobs] == text.made
    for at, (token, logprob, top) in enumerate(text.logprobs, start=len(PROMPTS[1]) - 1):
        assert logprob == pytest.approx(float(whole_TV[at, token]), abs=1e-4)
        assert [n for n, _ in top] == whole_TV[at].topk(3).indices.tolist()


def test_what_cannot_be_done_is_refused_at_once(model: HybridModel) -> None:
    engine = Engine(model, rows=1, length=20)
    with pytest.raises(SpecError, match="prompt has 15 tokens and 6 are to be written, but a text may have 20"):
        engine.submit([1] * 15, Sampling(max_tokens=6))
    with pytest.raises(SpecError, match="the prompt is empty"):
        engine.submit([], GREEDY)
    with pytest.raises(SpecError, match="no multi-token prediction"):
        Engine(build_model(ModelSpec.model_validate(BASE), seed=0), rows=1, length=5, drafts=True)
    with pytest.raises(SpecError, match=r"1000000 texts of 100000 tokens need [\d,]+ MiB .* free on cpu: \d+ fit"):
        check(model, 1_000_000, 100_000)
    assert check(model, 2, 30) == needed(model, 2, 30) == Engine(model, rows=2, length=30).cache.bytes


def test_as_many_rows_as_fit_into_memory(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one more; one at least must fit into all of it."""
    for rows in (1, 3):
        monkeypatch.setattr(memory, "free", lambda device, rows=rows: int(needed(model, rows, 40) / memory.SHARE) + 1)
        assert fitting_rows(model, 2, 40) == min(2, rows) and fitting_rows(model, 9, 40) == rows
    monkeypatch.setattr(memory, "free", lambda device: needed(model, 1, 40))
    assert fitting_rows(model, 9, 40) == 1
    monkeypatch.setattr(memory, "free", lambda device: needed(model, 1, 40) - 1)
    with pytest.raises(SpecError, match=r"^1 text of 40 tokens need .* not even one fits"):
        fitting_rows(model, 9, 40)


def test_a_kind_without_a_cache_says_so() -> None:
    from trainer.model.mixer import Mixer

    with pytest.raises(NotImplementedError, match="Mixer has no cache for generation"):
        Mixer().ready(torch.nn.Identity())


def test_texts_are_those_of_transformers_with_its_cache(tmp_path: Path) -> None:
    """NemotronH, an independent implementation, with the weights of our export."""
    spec = ModelSpec.model_validate(BASE).updated({"layers": ["M", "E", "*", "-", "M"], "mamba": {"num_groups": 2}})
    torch.manual_seed(0)
    model = build_model(spec, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    architecture, why_not = native(spec)
    assert architecture is not None, why_not
    save_file(dict(tensors(architecture, spec, model.state_dict(), torch.float32)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(architecture.config(spec, 128)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine = Engine(model, rows=3, length=80)
    texts = [engine.submit(prompt, Sampling(max_tokens=20)) for prompt in PROMPTS]
    engine.run()
    for prompt, text in zip(PROMPTS, texts, strict=True):
        with torch.inference_mode():
            row = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert text.made == row[0, len(prompt) :].tolist()
