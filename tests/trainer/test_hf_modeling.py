"""The modelling file for transformers computes what the trainer's model computes, with and without its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from micro import VOCAB
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from trainer.hf import own
from trainer.hf.folder import write
from trainer.hf.weights import own_tensors
from trainer.kinds.ngrams import token_classes
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec

pytestmark = pytest.mark.usefixtures("remote_code")
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 16}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 32}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden": 32,
    "mamba": {"num_heads": 4, "head_dim": 8, "d_state": 16, "num_groups": 1, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 6, "top_k": 2, "expert_width": 24},
    "mlp": {"width": 48},
    "layers": ["M"],
}
ENGRAM = {"rows_per_head": 50, "width_per_order": 16, "num_heads": 2}
SWIGLU = {"mlp": {"activation": "swiglu"}, "moe": {"activation": "swiglu", "shared_width": 16}}
MODELS: dict[str, dict[str, Any]] = {
    "as tiny": {"layers": ["ME", "*-", "N", "ME"], "engram": [{"layer": 2, **ENGRAM}]},
    "groups, shared expert, tied embedding, an Engram with more orders": {
        "layers": ["NM", "E", "*", "N", "-"],
        "mamba": {"num_groups": 2, "chunk_size": 8, "conv_kernel": 3},
        "moe": {"shared_width": 16},
        "engram": [
            {"layer": 3, **ENGRAM, "max_order": 4, "width_per_order": 12, "compress_tokens": False, "conv_kernel": 2},
            {"layer": 0, **ENGRAM, "max_order": 2},
        ],
        "tied_embedding": True,
    },
    "μP, biases, multi-token prediction": {
        "layers": ["M-", "N", "*E"],
        "attention": {"bias": True},
        "mlp": {"bias": True},
        "engram": [{"layer": 1, **ENGRAM}],
        "mup": {"base_hidden": 16, "base_head_dim": 8},
        "mtp": {"depth": 1},
    },
    "QK-norm, yarn, SwiGLU, softmax": {
        "layers": ["M*", "*-", "E"],
        "attention": {"qk_norm": True, "rope_theta": 1e3, "rope_scaling": YARN},
        **SWIGLU,
        "moe": {**SWIGLU["moe"], "scores": "softmax", "renormalise": False, "score_scale": 1.5},
    },
    "attention and experts alone, llama3": {
        "layers": ["*", "E"],
        "attention": {"num_kv_heads": 4, "rope_theta": 1e3, "rope_scaling": LLAMA3},
        "moe": {"scores": "softmax"},
    },
    "Mamba alone": {"layers": ["M", "M"]},
}


# Those of the kinds; the rest does not change what a trained model computes.
FIELDS = {
    "mamba": "num_heads head_dim d_state num_groups conv_kernel chunk_size",
    "attention": "num_heads num_kv_heads head_dim rope_theta rope_scaling qk_norm bias",
    "moe": "num_experts top_k expert_width shared_width score_scale scores renormalise activation",
    "mlp": "width activation bias",
    "engram": "layer max_order rows_per_head width_per_order num_heads conv_kernel compress_tokens",
}


def made(name: str, micro_data: Path) -> HybridModel:
    """A model with random weights of every kind."""
    spec = ModelSpec.model_validate(BASE).updated(MODELS[name])
    model = build_model(spec, seed=1, token_classes=token_classes(micro_data / "tokenizer" / "tokenizer.json"))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.15)
    return model.eval()


def written(model: HybridModel, folder: Path, micro_data: Path, dtype: torch.dtype = torch.float32) -> Path:
    config, named = own.config(model.spec, 64), own_tensors(model.state_dict(), dtype)
    write(folder, config, named, micro_data / "tokenizer", dtype=dtype, code=own.CODE)
    return folder


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    theirs, told = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(told.values()), told
    return theirs.eval()


def logits(model: HybridModel, ids_BT: Tensor) -> Tensor:
    return model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV


def close(actual: Tensor, expected: Tensor) -> None:
    """≤ 1e-5 of the largest."""
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("symbol", ModelSpec.kinds)
def test_every_option_of_a_kind_is_known(symbol: str) -> None:
    kind, known = ModelSpec.kinds[symbol], FIELDS[ModelSpec.section_names[symbol]].split()
    of_training = {"bias_update_rate", "sequence_loss_weight", "balance_loss_weight"}
    unknown = kind.model_fields.keys() - of_training - set(known)
    assert not unknown, f"compute {unknown} in trainer/hf/mixers_yaongi.py, test it here, and enter it in FIELDS"
    assert set(ModelSpec.kinds) == own.SYMBOLS


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_gradients_and_every_step_from_the_cache_are_ours(
    name: str, tmp_path: Path, micro_data: Path
) -> None:
    ours = made(name, micro_data)
    theirs = loaded(written(ours, tmp_path / "model", micro_data))
    ids_BT = torch.randint(1, VOCAB, (2, 40))
    labels_BT = ids_BT.roll(-1, 1)
    labels_BT[:, -1] = -100
    expected = logits(ours, ids_BT)
    out = theirs(ids_BT, labels=ids_BT, output_hidden_states=True)
    close(out.logits, expected)
    assert len(out.hidden_states) == len(ours.spec.layers) + 1

    loss = ours(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), labels_BT).ce_sum / (labels_BT != -100).sum()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)
    out.loss.backward()
    loss.backward()
    own_gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if "mtp" not in name}
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == own_gradients.keys()
    for key, gradient in own_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)

    with torch.no_grad():
        cache, parts = None, []
        for first, last in [(0, 19), *((t, t + 1) for t in range(19, 30)), (30, 40)]:
            part = theirs(ids_BT[:, first:last], past_key_values=cache, use_cache=True)
            cache = part.past_key_values
            parts.append(part.logits)
        close(torch.cat(parts, 1), expected)
        assert cache.get_seq_length() == 40


@pytest.mark.parametrize("name", list(MODELS)[:4])
def test_rows_of_several_lengths_are_as_alone_padded_on_either_side(
    name: str, tmp_path: Path, micro_data: Path
) -> None:
    ours = made(name, micro_data)
    theirs = loaded(written(ours, tmp_path / "model", micro_data))
    rows = [torch.randint(1, VOCAB, (length,)) for length in (3, 21, 12)]
    with torch.no_grad():
        alone = [logits(ours, row[None])[0] for row in rows]
        for side in ("left", "right"):
            ids_BT, mask_BT = torch.full((3, 21), 7), torch.zeros(3, 21, dtype=torch.int64)
            for i, row in enumerate(rows):
                place = slice(21 - len(row), None) if side == "left" else slice(len(row))
                ids_BT[i, place], mask_BT[i, place] = row, 1
            found = theirs(ids_BT, attention_mask=mask_BT, use_cache=False)
            assert found.past_key_values is None and found.logits.isfinite().all()
            for i, expected in enumerate(alone):
                close(found.logits[i, mask_BT[i].bool()], expected)
            if side == "left":
                left_BT, left_mask_BT = ids_BT, mask_BT
        made_BT = theirs.generate(left_BT, attention_mask=left_mask_BT, max_new_tokens=9, do_sample=False)
        for i, row in enumerate(rows):
            for token in made_BT[i, 21:]:
                best = logits(ours, row[None])[0, -1].argmax()
                assert token == best, "each from the cache, as without"
                if token in theirs.generation_config.eos_token_id:
                    break
                row = torch.cat([row, token[None]])


def test_generation_with_and_without_cache_and_by_beams_is_one(tmp_path: Path, micro_data: Path) -> None:
    theirs = loaded(written(made("as tiny", micro_data), tmp_path / "model", micro_data))
    prompt = torch.randint(3, VOCAB, (2, 9))
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        cached, plain = (theirs.generate(prompt, use_cache=use, **options) for use in (True, False))
        assert cached.shape == (2, 21) and torch.equal(cached, plain)
    with pytest.raises(ValueError, match="DynamicCache; pass none, or a YaongiCache"):
        theirs(prompt, past_key_values=DynamicCache())


def test_types_are_kept_in_the_files_and_in_the_model(tmp_path: Path, micro_data: Path) -> None:
    ours = made("groups, shared expert, tied embedding, an Engram with more orders", micro_data)
    folder = written(ours, tmp_path / "model", micro_data, torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert "head.weight" not in stored
    theirs = loaded(folder)
    assert theirs.dtype == torch.bfloat16 and theirs.head.weight is theirs.embedding.weight
    state = theirs.state_dict()
    assert state.pop("head.weight") is not None and state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
        wide = name.endswith(("bias_E", "norm.weight", "A_log", ".D", "dt_bias", "router.weight"))
        assert tensor.dtype == (torch.int64 if ".hash." in name else torch.float32 if wide else torch.bfloat16), name
    assert torch.equal(stored["layers.3.0.mixer.hash.class_V"], ours.layers[3][0].mixer.hash.class_V)
    ids_BT = torch.randint(1, VOCAB, (2, 40))
    with torch.no_grad():
        expected = logits(ours, ids_BT)
        assert (theirs(ids_BT).logits - expected).abs().mean() < 0.02 * expected.abs().mean()
    theirs.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
