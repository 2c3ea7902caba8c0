"""Rotary positions against transformers' Llama, and their restart in each document."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trainer.kinds.attention import AttentionSpec
from trainer.ops import Documents
from trainer.ops.rotary import rates, rotate, turns
from trainer.specbase import SpecError, parse


def test_rotation_equals_llamas_also_at_positions_far_from_0():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    q_BTHW, k_BTHW = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    position_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 0, 4095, 8191, 12000, 16382, 16383]])
    cos, sin = LlamaRotaryEmbedding(config)(q_BTHW, position_BT)
    theirs = apply_rotary_pos_emb(q_BTHW.transpose(1, 2), k_BTHW.transpose(1, 2), cos, sin)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, rope_theta=500000.0)
    for mine, expected in zip((q_BTHW, k_BTHW), theirs, strict=True):
        torch.testing.assert_close(
            rotate(mine, *turns(position_BT, spec.rotation)), expected.transpose(1, 2), atol=1e-5, rtol=1e-5
        )


SCALINGS = {
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"kind": "llama3", "factor": 8.0, "original_length": 8192},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "original_length": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_scaled_rotations_equal_those_of_transformers(kind: str, theta: float):
    ours, theirs = SCALINGS[kind]
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=128, rope_theta=theta, rope_scaling=ours)
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    embedding = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(rates(spec.rotation), embedding.inv_freq, atol=0, rtol=1e-5)
    assert spec.rope_scaling.amplitude == pytest.approx(embedding.attention_scaling)
    assert not torch.allclose(rates(spec.rotation), rates(spec.updated({"rope_scaling": None}).rotation))


def test_rotations_that_cannot_be_scaled_are_refused():
    for changes, message in (
        ({"rope_theta": None}, "rope_theta, their base, is missing"),
        ({"rope_scaling": {"kind": "yarn", "factor": 4.0}}, "yarn needs original_length"),
    ):
        given = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e4, "rope_scaling": SCALINGS["yarn"][0], **changes}
        with pytest.raises(SpecError, match=message):
            parse(AttentionSpec, given)


def test_positions_begin_afresh_in_each_document():
    seq_idx_BT = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [9, 9, 9, 9, 9, 9, 9], [1, 2, 3, 3, 4, 4, 5]])
    assert Documents(seq_idx_BT).position_BT.tolist() == [
        [0, 1, 2, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 1, 0, 1, 0],
    ]
