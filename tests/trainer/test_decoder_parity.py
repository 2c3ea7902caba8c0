"""Dense and mixture-of-experts decoders against transformers' Qwen3 and Qwen3-MoE, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from qwen_oracle import DENSE, MOE, copy_weights, paired, qwen_for

from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.spec import BackendsSpec

FAST = BackendsSpec()
REFERENCE = BackendsSpec(attention="reference", experts="reference")
SPECS = {
    "dense": DENSE,
    "tied": DENSE.updated({"tied_embedding": True}),
    "bias": DENSE.updated({"attention": {"bias": True}}),
    "moe": MOE,
    "moe without renormalisation": MOE.updated({"moe": {"renormalise": False}}),
    "moe, tied": MOE.updated({"tied_embedding": True}),
}


def pair(spec: ModelSpec, backends: BackendsSpec = FAST):
    torch.manual_seed(0)
    ours = build_model(spec, backends, seed=3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)  # else they would do nothing
    theirs = qwen_for(spec)
    copy_weights(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("backends", [FAST, REFERENCE], ids=["fast", "reference"])
@pytest.mark.parametrize("name", SPECS)
def test_logits_loss_and_gradients_equal_qwen3(name: str, backends: BackendsSpec):
    spec = SPECS[name]
    ours, theirs = pair(spec, backends)
    assert {name for name, _ in ours.named_parameters()} == paired(ours, theirs).keys()
    ids_BT = torch.randint(0, spec.vocab_size, (2, 37))
    seq_idx_BT = torch.zeros(2, 37, dtype=torch.int32)
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((2, 1), -100)], dim=1)
    logits_theirs = theirs(ids_BT).logits
    logits_ours = ours(ids_BT, seq_idx_BT).logits_BTV
    assert logits_ours.std() > 0.3  # a model whose output says something
    torch.testing.assert_close(logits_ours, logits_theirs, atol=2e-5, rtol=1e-4)

    output = ours(ids_BT, seq_idx_BT, labels_BT)
    loss_theirs = F.cross_entropy(logits_theirs.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    torch.testing.assert_close(output.ce_sum, loss_theirs, atol=1e-4, rtol=1e-5)
    output.ce_sum.backward()
    loss_theirs.backward()
    for name, (mine, others) in paired(ours, theirs).items():
        grad = torch.cat([other.grad for other in others])
        # Adding the same number to the scores of all keys changes nothing, so the bias of keys has no gradient but
        # what positions make of it.
        scale = grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(mine.grad, grad, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_twenty_steps_of_adamw_give_the_losses_of_a_plain_loop():
    ours, theirs = pair(MOE.updated({"init_std": 0.05}))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1) for model in (ours, theirs)]
    losses: list[list[float]] = [[], []]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        ids_BT = (torch.randint(0, 96, (4, 1), generator=generator) + 7 * torch.arange(33)) % MOE.vocab_size
        inputs_BT, labels_BT = ids_BT[:, :-1], ids_BT[:, 1:].contiguous()
        found = (
            ours(inputs_BT, torch.zeros_like(inputs_BT, dtype=torch.int32), labels_BT).ce_sum / labels_BT.numel(),
            F.cross_entropy(theirs(inputs_BT).logits.flatten(0, 1), labels_BT.flatten()),
        )
        for loss, optimizer, kept in zip(found, optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.3, "it learns"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_balance_loss_is_that_of_transformers_layer_by_layer():
    """Theirs has no division by top_k (trainer/kinds/moe.py)."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    spec = MOE.updated({"moe": {"balance_loss_weight": 0.02}})
    ours, theirs = pair(spec)
    ids_BT = torch.randint(0, spec.vocab_size, (3, 21))
    output = ours(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), ids_BT)
    logits = theirs(ids_BT, output_router_logits=True).router_logits
    expected = sum(load_balancing_loss_func((layer,), spec.moe.num_experts, spec.moe.top_k) for layer in logits)
    torch.testing.assert_close(output.aux_sum, 3 * 0.02 * expected / spec.moe.top_k, atol=1e-6, rtol=1e-5)
    output.aux_sum.backward()
    assert all(moe.router.weight.grad.ne(0).any() for moe in ours.moe_sublayers())


@pytest.mark.parametrize("name", SPECS)
def test_documents_do_not_see_each_other(name: str):
    spec = SPECS[name].updated({"init_std": 0.05})
    model = build_model(spec, FAST, seed=3)
    ids_BT = torch.randint(0, spec.vocab_size, (1, 30))
    seq_idx_BT = (torch.arange(30) >= 13).int()[None]
    packed_TV = model(ids_BT, seq_idx_BT).logits_BTV[0]
    alone_TV = model(ids_BT[:, 13:], seq_idx_BT[:, 13:]).logits_BTV[0]
    torch.testing.assert_close(packed_TV[13:], alone_TV, atol=2e-5, rtol=1e-4)


def test_softmax_of_the_chosen_is_the_renormalised_softmax_of_all():
    """What Mixtral calls softmax after top-k is the same routing."""
    ours, _ = pair(MOE)
    moe = ours.moe_sublayers()[0]
    x_BTD = torch.randn(1, 50, MOE.hidden)
    _, expert_SK, weight_SK, _ = moe.routed(moe.project(x_BTD)[1][0])
    chosen_SK = (x_BTD[0] @ moe.router.weight.T).gather(1, expert_SK)
    torch.testing.assert_close(weight_SK, chosen_SK.softmax(-1), atol=1e-6, rtol=1e-5)
