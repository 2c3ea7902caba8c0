"""Every kind of layer, continued from its cache, computes what a forward pass over the whole row computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.arithmetic.states import cache_bytes
from trainer.inference.cache import Cache
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec

VOCAB, LENGTH = 64, 600
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}
ENGRAM = {"rows_per_head": 40, "width_per_order": 16, "num_heads": 2, "compress_tokens": False}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden": 32,
    "mamba": {"num_heads": 4, "head_dim": 8, "d_state": 16, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 6, "top_k": 2, "expert_width": 24},
    "mlp": {"width": 48},
    "layers": ["M"],
}
MODELS: dict[str, dict[str, Any]] = {
    "M": {"layers": ["M", "M"], "mamba": {"num_groups": 2}},
    "*": {"layers": ["*", "*"]},
    "* turned, QK-norm, bias": {
        "layers": ["*", "*"],
        "attention": {"rope_theta": 1e3, "rope_scaling": YARN, "qk_norm": True, "bias": True},
    },
    "E": {"layers": ["E"], "moe": {"shared_width": 16}},
    "E SwiGLU, softmax": {"layers": ["E"], "moe": {"activation": "swiglu", "scores": "softmax", "renormalise": False}},
    "-": {"layers": ["-"], "mlp": {"activation": "swiglu", "bias": True}},
    "N": {"layers": ["N", "-", "N"], "engram": [{"layer": 0, **ENGRAM}, {"layer": 2, **ENGRAM, "max_order": 4}]},
    "adapters (LoRA)": {"layers": ["ME", "*-"], "lora": {"rank": 2}, "moe": {"shared_width": 16}},
    "all, tied, μP": {
        "layers": ["ME", "*-", "N", "M*E"],
        "engram": [{"layer": 2, **ENGRAM}],
        "tied_embedding": True,
        "mup": {"base_hidden": 16, "base_head_dim": 8},
    },
}


def made(name: str) -> HybridModel:
    """A model with random weights of every kind."""
    torch.manual_seed(0)
    model = build_model(ModelSpec.model_validate(BASE).updated(MODELS[name]), seed=1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def whole(model: HybridModel, ids_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV


def ids(rows: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_step_by_step_is_a_whole_pass(name: str) -> None:
    """A prompt of some length, then single tokens over the edges of chunks, then pieces of several lengths."""
    model, ids_BT = made(name), ids(2)
    expected_BTV, cache = whole(model, ids_BT), Cache(model, 2, LENGTH)
    assert expected_BTV.std() > 0.1
    at, parts = 0, []
    for new in (1, 2, 13, *[1] * 3, 30, *[1] * 20, 63, 64, 65, *[1] * 3, 129, *[1] * 207):
        h_BTD = cache.extend(ids_BT[:, at : at + new], 0, [at, at])
        parts.append(cache.logits(h_BTD))
        at += new
    assert at == LENGTH
    close(torch.cat(parts, dim=1), expected_BTV)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_rows_of_several_lengths_are_as_alone(name: str) -> None:
    """Prompts of unequal length, padded on the right, then tokens; states take in only what is kept; a row moves."""
    model, ids_BT = made(name), ids(3)
    expected_BTV, cache = whole(model, ids_BT), Cache(model, 4, 200)
    lengths = [5, 130, 64]
    prompt_BT = torch.where(torch.arange(130) < torch.tensor(lengths)[:, None], ids_BT[:, :130], 7)
    logits_BTV = cache.logits(cache.extend(prompt_BT, 1, [0, 0, 0], lengths))
    for b, length in enumerate(lengths):
        close(logits_BTV[b, :length], expected_BTV[b, :length])
    for keep in ([1, 1, 1], [1, 3, 2], [2, 1, 3], [3, 3, 3], [1, 1, 1]):
        new_BT = torch.stack([ids_BT[b, at : at + 3] for b, at in enumerate(lengths)])
        logits_BTV = cache.logits(cache.extend(new_BT, 1, lengths, keep))
        for b, at in enumerate(lengths):
            close(logits_BTV[b], expected_BTV[b, at : at + 3])
        lengths = [at + count for at, count in zip(lengths, keep, strict=True)]
    cache.move(3, 0, lengths[2])  # the third text becomes the first row, and the second stays behind it
    order = [2, 0, 1]
    for _ in range(3):
        at = [lengths[b] for b in order]
        new_BT = torch.stack([ids_BT[b, n : n + 1] for b, n in zip(order, at, strict=True)])
        logits_BTV = cache.logits(cache.extend(new_BT, 0, at))
        for row, b in enumerate(order):
            close(logits_BTV[row, 0], expected_BTV[b, lengths[b]])
        lengths = [length + 1 for length in lengths]


@torch.inference_mode()
def test_a_cleared_row_has_no_memory() -> None:
    model, ids_BT = made("all, tied, μP"), ids(1)
    cache = Cache(model, 1, 100)
    first = cache.extend(ids_BT[:, :90], 0, [0])
    cache.clear(0, 1)
    assert torch.equal(cache.extend(ids_BT[:, :90], 0, [0]), first)


def test_only_attention_grows_with_the_length() -> None:
    spec = {name: ModelSpec.model_validate(BASE).updated(changes) for name, changes in MODELS.items()}
    for name in ("M", "N", "E", "-"):
        assert cache_bytes(spec[name], 10, 4) == cache_bytes(spec[name], 10_000, 4), name
    one = 2 * 2 * 2 * 16 * 4  # two layers, keys and values, two heads of 16 numbers
    assert cache_bytes(spec["*"], 1000, 4) == 1000 * one
    # Mamba-2: 3 inputs of the convolution, 8·4 + 2·2·16 channels, and the state of 4 heads of 8 × 16, in each layer.
    assert cache_bytes(spec["M"], 1000, 2) == 2 * (3 * 96 * 2 + 4 * 8 * 16 * 4)
    for name, each in spec.items():
        assert Cache(made(name), 3, 50).bytes == 3 * cache_bytes(each, 50, 4)


@torch.inference_mode()
def test_bf16_weights_are_continued_as_a_whole_pass_too() -> None:
    model = made("all, tied, μP").bfloat16()
    ids_BT = ids(1)[:, :60]
    cache = Cache(model, 1, 60)
    pieces = [cache.logits(cache.extend(ids_BT[:, t : t + 1], 0, [t])) for t in range(60)]
    expected_BTV = whole(model, ids_BT).float()
    assert (torch.cat(pieces, dim=1) - expected_BTV).std() < 0.1 * expected_BTV.std()


@pytest.mark.parametrize("made_inside", [True, False])
@torch.inference_mode()
def test_autocast_continues_as_a_whole_pass_and_the_router_stays_fp32(made_inside: bool) -> None:
    """Whether the cache was made inside autocast or before."""
    model, ids_BT = made("E"), ids(1)[:, :40]
    cache = None if made_inside else Cache(model, 1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        cache = cache or Cache(model, 1, 40)
        pieces = [cache.logits(cache.extend(ids_BT[:, t : t + 1], 0, [t])) for t in range(40)]
        expected_BTV = whole(model, ids_BT).float()
    assert (torch.cat(pieces, dim=1) - expected_BTV).std() < 0.02 * expected_BTV.std()
