"""Rotary positions against transformers' Llama, and their restart in each document."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trainer.model.attention import rotate
from trainer.ops import Documents


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
    for mine, expected in zip((q_BTHW, k_BTHW), theirs, strict=True):
        torch.testing.assert_close(rotate(mine, position_BT, 500000.0), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_positions_begin_afresh_in_each_document():
    seq_idx_BT = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [9, 9, 9, 9, 9, 9, 9], [1, 2, 3, 3, 4, 4, 5]])
    assert Documents(seq_idx_BT).position_BT.tolist() == [
        [0, 1, 2, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 1, 0, 1, 0],
    ]
