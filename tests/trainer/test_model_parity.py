"""The whole model against transformers' NemotronH: logits, loss and every gradient, in fp32."""

import pytest
import torch
from nemotron_oracle import copy_weights, nemotron_for, paired_parameters

from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.spec import BackendsSpec

SPEC = ModelSpec(
    vocab_size=96,
    hidden=64,
    layers=["ME", "*-", "M", "E", "*", "ME"],
    mamba={"num_heads": 4, "head_dim": 16, "d_state": 16, "num_groups": 2, "chunk_size": 16},
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    moe={"num_experts": 8, "top_k": 3, "expert_width": 32, "sequence_loss_weight": 0.0},
    mlp={"width": 96},
    init_std=0.15,
)
FAST = BackendsSpec()
REFERENCE = BackendsSpec(**dict.fromkeys(BackendsSpec.model_fields, "reference"))


@pytest.mark.parametrize("backends", [FAST, REFERENCE], ids=["fast", "reference"])
@pytest.mark.parametrize("shared_width", [0, 24])
def test_logits_loss_and_gradients_equal_nemotron(backends, shared_width):
    spec = SPEC.updated({"moe": {"shared_width": shared_width}})
    torch.manual_seed(0)
    ours = build_model(spec, backends, seed=3)
    with torch.no_grad():
        for moe in ours.moe_sublayers():
            moe.bias_E.uniform_(-0.2, 0.2)  # large enough to change the choice of experts
    theirs = nemotron_for(spec)
    copy_weights(ours, theirs)

    ids_BT = torch.randint(0, spec.vocab_size, (2, 37))
    seq_idx_BT = torch.zeros(2, 37, dtype=torch.int32)
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((2, 1), -100)], dim=1)
    logits_theirs = theirs(ids_BT).logits
    logits_ours = ours(ids_BT, seq_idx_BT).logits_BTV
    assert logits_ours.std() > 0.5  # a model whose output says something
    torch.testing.assert_close(logits_ours, logits_theirs, atol=2e-5, rtol=1e-4)

    output = ours(ids_BT, seq_idx_BT, labels_BT)
    loss_theirs = torch.nn.functional.cross_entropy(logits_theirs.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    torch.testing.assert_close(output.ce_sum, loss_theirs, atol=1e-4, rtol=1e-5)
    output.ce_sum.backward()
    loss_theirs.backward()
    for name, mine, other in paired_parameters(ours, theirs):
        if name.endswith("bias_E"):
            continue
        scale = other.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            mine.grad, other.grad, atol=2e-5 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_pairs_cover_every_parameter():
    ours = build_model(SPEC, seed=0)
    paired = {name for name, _mine, _other in paired_parameters(ours, nemotron_for(SPEC))}
    assert {name for name, _ in ours.named_parameters()} <= paired
