"""Models of transformers, saved by it, read into ours and written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nemotron_oracle import nemotron_for
from qwen_oracle import DENSE, MOE, qwen_for
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trainer.errors import CheckpointError, SpecError
from trainer.hf.architectures import architecture_of, native
from trainer.hf.files import parts_of
from trainer.hf.weights import read_into, tensors
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.pretrained import find, refuse_damaged
from trainer.specbase import parse

HYBRID = ModelSpec.model_validate(
    {
        "vocab_size": 96,
        "hidden": 64,
        "layers": ["M", "E", "*", "-", "M", "E"],
        "mamba": {"num_heads": 4, "head_dim": 16, "d_state": 16, "num_groups": 2, "chunk_size": 16},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "moe": {"num_experts": 8, "top_k": 3, "expert_width": 32, "shared_width": 24, "sequence_loss_weight": 0.0},
        "mlp": {"width": 96},
        "init_std": 0.15,
    }
)


def llama() -> PreTrainedModel:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        )
    )


MODELS = {
    "qwen3": lambda: qwen_for(DENSE),
    "qwen3, tied": lambda: qwen_for(DENSE.updated({"tied_embedding": True, "attention": {"bias": True}})),
    "qwen3_moe": lambda: qwen_for(MOE),
    "qwen3_moe, not renormalised": lambda: qwen_for(MOE.updated({"moe": {"renormalise": False}})),
    "nemotron_h": lambda: nemotron_for(HYBRID),
    "nemotron_h, experts alone": lambda: nemotron_for(HYBRID.updated({"layers": ["E", "*", "E"]})),
    "llama": llama,
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights of every kind, in `folder` as transformers saves it, in several files."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model.eval()


def imported(folder: Path) -> HybridModel:
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of(config, str(folder))
    spec = parse(ModelSpec, architecture.reads(config), str(folder))
    model = build_model(spec, seed=None).to_empty(device="cpu")
    parts, ignored = parts_of(architecture, spec)
    read_into(folder, parts, model, ignored=ignored)
    return model.eval()


def both(name: str, folder: Path) -> tuple[PreTrainedModel, HybridModel, torch.Tensor]:
    """A model as transformers has it and as it is imported, and some ids."""
    theirs = saved(name, folder)
    for block in theirs.model.layers:
        if getattr(block, "block_type", "") == "linear_attention":
            block.mixer.time_step_limit = (0.0, float("inf"))  # see nemotron_oracle
    return theirs, imported(folder), torch.randint(0, 96, (2, 40))


def logits(model: HybridModel, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs_and_what_is_written_loads_there_again(name: str, tmp_path: Path) -> None:
    theirs, ours, ids_BT = both(name, tmp_path / "in")
    with torch.no_grad():
        expected = theirs(ids_BT).logits
    torch.testing.assert_close(logits(ours, ids_BT), expected, atol=5e-5, rtol=1e-4)

    architecture, _ = native(ours.spec)
    assert architecture is not None and architecture.model_type == name.partition(",")[0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(architecture.config(ours.spec, 4096)))
    written = dict(tensors(architecture, ours.spec, ours.state_dict(), torch.float32))
    save_file({k: v.contiguous() for k, v in written.items()}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids_BT).logits, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_what_came_in_are_theirs(name: str, tmp_path: Path) -> None:
    theirs, ours, ids_BT = both(name, tmp_path / "in")
    expected = theirs(ids_BT, labels=ids_BT).loss
    expected.backward()
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = ours(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), labels_BT).ce_sum / (labels_BT >= 0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    with torch.no_grad():
        for parameter in theirs.parameters():  # saved as weights, gradients have the names that weights have in files
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = load_file(tmp_path / "gradients" / "model.safetensors")
    gradients = ours.state_dict() | {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    architecture, _ = native(ours.spec)
    assert architecture is not None
    found = {part.theirs for part in architecture.parts(ours.spec)}
    for key, value in tensors(architecture, ours.spec, gradients, torch.float32):
        if key in found and not key.endswith("e_score_correction_bias"):
            scale = wanted[key].abs().max().item()
            torch.testing.assert_close(
                value, wanted[key], rtol=1e-4, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_in_goes_out_byte_for_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, tmp_path, dtype)
    ours = imported(tmp_path)
    architecture, _ = native(ours.spec)
    assert architecture is not None
    before = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    after = dict(tensors(architecture, ours.spec, ours.state_dict(), dtype))
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key].to(value.dtype), value), key


def test_fp8_blocks_are_multiplied_out(tmp_path: Path) -> None:
    spec = DENSE.updated({"hidden": 192, "layers": ["*-"], "mlp": {"width": 320}})
    torch.manual_seed(0)
    qwen_for(spec).save_pretrained(tmp_path)
    exact = load_file(tmp_path / "model.safetensors")
    stored, wanted = {}, {}
    for name, value in exact.items():
        if not name.endswith("proj.weight"):
            stored[name] = wanted[name] = value
            continue
        rows, columns = (-(-side // 128) for side in value.shape)
        scale = torch.rand(rows, columns) / 100 + 0.001
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
        stored[name], stored[f"{name}_scale_inv"] = (value / wide).to(torch.float8_e4m3fn), scale
        wanted[name] = stored[name].float() * wide
    apart = {name: "b.safetensors" if name.endswith("_scale_inv") else "a.safetensors" for name in stored}
    for place in apart.values():  # scales may be in the file after that of their weight
        save_file({name: stored[name] for name in apart if apart[name] == place}, tmp_path / place, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": apart}))
    for together in (False, True):
        if together:
            index.unlink()
            save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        ours = imported(tmp_path)
        architecture, _ = native(ours.spec)
        assert architecture is not None
        for name, value in tensors(architecture, ours.spec, ours.state_dict(), torch.float32):
            assert torch.equal(value, wanted[name]), name
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight is FP8, but .*_scale_inv is missing"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "model.layers.1.mlp.up_proj.weight is missing, which config"),
        ({"add": "model.layers.1.mlp.other.weight"}, "other.weight belongs to no layer that config.json describes"),
        (
            {"config": {"intermediate_size": 128}},
            r"down_proj.weight has shape \[64, 96\], config.json requires \[64, 128",
        ),
        ({"config": {"num_hidden_layers": 2}}, "model.layers.2.* belongs to no layer"),
        ({"config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"config": {"model_type": "mistral9"}}, "model_type 'mistral9' is not known; known are qwen3, "),
        ({"cut": True}, "is not a readable safetensors file"),
        ({"dtype": torch.int8}, r"down_proj\.weight has dtype I8, supported are"),
        (
            {"dtype": torch.float8_e4m3fn, "add": "model.layers.0.mlp.down_proj.weight_scale_inv"},
            r"down_proj\.weight_scale_inv has shape \[2, 2\], blocks of 128 × 128 need \[1, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    qwen_for(DENSE).save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    weights.pop(change.get("drop", ""), None)
    if "add" in change:
        weights[change["add"]] = torch.zeros(2, 2)
    if "dtype" in change:
        weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 96).to(change["dtype"])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | change.get("config", {})))
    if "cut" in change:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
    with pytest.raises((CheckpointError, SpecError), match=message) as error:
        imported(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises((CheckpointError, SpecError), match=message):  # without any weight, before there is data
        refuse_damaged(found := find(tmp_path), found.model)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    qwen_for(DENSE).save_pretrained(tmp_path, max_shard_size="40KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"-00002-of-.* is in another file too; download the folder again"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tied_embedding": True}, "its head is never tied to the embedding"),
        ({"attention": {"bias": True}}, "no positions, no norms of queries and keys, and no biases"),
        ({"mlp": {"bias": True}}, "if its MLPs have biases, so do its shared experts"),
        ({"layers": ["ME", "M-"]}, "its cache needs at least one attention layer"),
        ({"mlp": {"bias": True}, "layers": ["M*-"]}, None),
        ({"mlp": {"activation": "swiglu"}, "layers": ["M*E"]}, None),
        ({"mtp": {"depth": 1}}, None),
    ],
)
def test_hybrids_that_would_lose_weights_in_theirs_are_none(change: dict, why: str | None) -> None:
    """transformers takes such a configuration, and makes up or leaves out the weights in question."""
    architecture, reasons = native(HYBRID.updated(change))
    assert (architecture is None) == (why is not None) and (why or "") in reasons


def test_configurations_have_what_older_programs_read() -> None:
    architecture, _ = native(HYBRID)
    assert architecture is not None
    config = architecture.config(HYBRID, 64)
    assert config["hybrid_override_pattern"] == "ME*-ME" and config["mamba_ssm_cache_dtype"] == "float32"
    assert config["n_group"] == config["topk_group"] == 1
    yarn = {"kind": "yarn", "factor": 4.0, "original_length": 32}
    scaled = DENSE.updated({"attention": {"rope_theta": 5e5, "rope_scaling": yarn}})
    architecture, _ = native(scaled)
    assert architecture is not None
    config = architecture.config(scaled, 64)
    assert config["rope_theta"] == 5e5 and config["rope_scaling"]["rope_type"] == "yarn"
    assert AutoConfig.for_model(**config).rope_parameters == config["rope_parameters"]
    del config["rope_parameters"]
    assert architecture.reads(config)["attention"]["rope_scaling"]["factor"] == 4.0


def test_what_is_no_model_of_theirs_says_why() -> None:
    tiny = HYBRID.updated(
        {"layers": ["M", "N"], "engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}]}
    )
    architecture, why = native(tiny)
    assert architecture is None and "nemotron_h: it has no Engram" in why and "qwen3: layers are not all *-" in why
