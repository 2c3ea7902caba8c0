"""Configurations of transformers that describe an unsupported model are refused by `find` in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import CheckpointError, SpecError
from trainer.pretrained import find

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
}
NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 512,
    "hidden_size": 64,
    "hybrid_override_pattern": "*-",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "layer_norm_epsilon": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def in_folder(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be a positive whole number"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; .* up to 10,000"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads is 0; it must be"),
        (LLAMA, {"model_type": ["llama"]}, r"model_type \['llama'\] is not known"),
        (LLAMA, {"rope_scaling": "yarn"}, "rope_parameters 'yarn' is not supported"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only one set for all layers"),
        (LLAMA, {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor 1.0 is not supported"),
        (LLAMA, {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale 1.0 is not supported"),
        (LLAMA, {"rope_scaling": YARN | {"truncate": False}}, "truncate False is not supported, only True"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported, only 1.0"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq' .*; use .* BF16"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"'fp8' and weight_block_size \[64, 64\] is not supported",
        ),
        (NEMOTRON, {"tie_word_embeddings": True}, "tie_word_embeddings True is not supported, only False"),
        (NEMOTRON, {"time_step_limit": [0.001, 0.1]}, r"time_step_limit \[0\.001, 0\.1\] is not supported"),
        (NEMOTRON, {"hybrid_override_pattern": 5}, "layers_block_type is 5; it must be a list"),
        (NEMOTRON, {"layers_block_type": [["mamba"]]}, "which is not one of linear_attention"),
    ],
)
def test_what_would_be_another_model_is_refused(base: dict, change: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said) as error:
        find(in_folder(tmp_path, base | change))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    rope = YARN | {"rope_theta": 5e5, "attention_factor": None, "partial_rotary_factor": 1.0}
    model = find(in_folder(tmp_path, LLAMA | {"quantization_config": fp8, "rope_parameters": rope})).model
    assert model.attention is not None and model.attention.rope_scaling is not None
    assert (model.attention.rope_theta, model.attention.rope_scaling.factor) == (5e5, 4.0)
    for limit in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        assert find(in_folder(tmp_path, NEMOTRON | {"time_step_limit": limit, "rope_theta": 1e4})).model.attention


def test_an_export_without_its_manifest_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing beside config\.json of an export"):
        find(in_folder(tmp_path, {"layers": ["*-"]}))
