"""Additions to the stream that the next sublayer's norm makes: the numbers are those of x ← x + mixer(norm(x)).

The kernel itself: tests/kernels/test_add_norm_kernels.py; its other backends: test_ops.py.
"""

from types import MethodType

import pytest
import torch
from torch import Tensor

from trainer.model.hybrid import HybridModel, Layer, build_model
from trainer.model.norm import RMSNorm
from trainer.modelspec import ModelSpec
from trainer.ops import OPS, Documents
from trainer.recomputing import set_policy

# Engram first, between and last in its layer, and a layer of one sublayer.
SPEC = ModelSpec(
    vocab_size=50,
    hidden=24,
    layers=["MNE", "N*-", "-N", "M"],
    mamba={"num_heads": 2, "head_dim": 8, "d_state": 8, "chunk_size": 16},
    attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    moe={"num_experts": 4, "top_k": 2, "expert_width": 16, "shared_width": 8},
    mlp={"width": 32},
    engram=[
        {"layer": layer, "rows_per_head": 20, "width_per_order": 8, "num_heads": 2, "compress_tokens": False}
        for layer in (0, 1, 2)
    ],
    mtp={"depth": 1, "layer": "*E"},
)


def formerly(layer: Layer, x_BTD: Tensor, ids_BT: Tensor, documents: Documents) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loop as it reads: each sublayer's output is added at once, each norm is on its own."""
    aux_sum, loads = torch.zeros(()), []
    for sublayer in layer:
        y_BTD, aux_loss, load_E = sublayer.mixer(x_BTD, sublayer.norm, ids_BT, documents)
        x_BTD = x_BTD + y_BTD
        aux_sum = aux_sum if aux_loss is None else aux_sum + aux_loss
        loads += [] if load_E is None else [load_E]
    return x_BTD, aux_sum, loads


def outcome(model: HybridModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Losses and gradients of a pass over packed rows."""
    ids_BT = torch.randint(0, model.spec.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    seq_idx_BT = (torch.arange(40) > 13).int().expand(2, -1).contiguous()
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = model(ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1))
    (output.ce_sum + output.aux_sum + output.mtp_ce_sum_K.sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients | {"loss": output.ce_sum.detach(), "aux": output.aux_sum.detach()}


def randomised_norms(model: HybridModel) -> HybridModel:
    """With norm weights other than 1, which would hide a weight that is used twice or not at all."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_and_gradients_are_those_of_the_plain_loop_to_the_last_bit(policy, dtype):
    model = randomised_norms(build_model(SPEC, seed=0))
    assert model.choices["add_norm"].name == "torch" and model.choices["add_norm"].proven
    set_policy(model, policy)
    found = outcome(model, dtype)
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer._run = MethodType(formerly, layer)
    expected = outcome(model, dtype)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_each_addition_within_a_layer_is_made_with_the_norm_that_follows():
    """Every pre-norm but the first of its layer gets something to add, unless Engram's addition came between."""
    seen: list[bool] = []
    plain = OPS["add_norm"].backends["torch"].function

    def watched(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        seen.append(y is not None)
        return plain(x, y, weight, eps)

    model = build_model(SPEC, seed=0)
    for module in model.modules():
        if hasattr(module, "_add_norm"):
            module._add_norm = watched
    outcome(model)
    #        M      E      *     -     -      M      *      E of multi-token prediction
    assert seen == [False, True, True, True, False, False, False, True]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_equal_the_formula_in_fp64(backend, adds):
    generator = torch.Generator().manual_seed(0)
    x, y, grad_sum, grad_out = (torch.randn(3, 5, 17, generator=generator) for _ in range(4))
    weight = torch.rand(17, generator=generator) + 0.5
    leaves = [each.clone().requires_grad_() for each in (x, y, weight)]
    total, normed = OPS["add_norm"].backends[backend].function(leaves[0], leaves[1] if adds else None, leaves[2], 1e-5)
    ((total * grad_sum).sum() + (normed * grad_out).sum()).backward()
    s = (x + y if adds else x).double()
    r = 1 / (s.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    g = grad_out * weight.double()
    grad = r * g - s * r**3 * (g * s).mean(-1, keepdim=True) + grad_sum
    expected = [s, s * r * weight, grad, (grad_out * s * r).sum((0, 1))]
    for mine, right in zip((total, normed, leaves[0].grad, leaves[2].grad), expected, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-5)
    assert torch.equal(leaves[1].grad, leaves[0].grad) if adds else leaves[1].grad is None
