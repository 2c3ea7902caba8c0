"""The kernel of addition and norm in Triton's interpreter, against the formula in FP64."""

import os

import pytest
import torch
from torch import Tensor

from trainer import parity
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Setting, add_norm_triton
from trainer.ops.check import compare
from trainer.recomputing import set_policy
from trainer.spec import BackendsSpec

pytestmark = pytest.mark.kernels

CPU = Setting(torch.device("cpu"))
EPS = 1e-5


@pytest.fixture(autouse=True)
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    assert add_norm_triton.unsupported(CPU) is None


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def exact(x: Tensor, y: Tensor | None, weight: Tensor, grad_sum: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Sum, norm and gradients by the formula, written out: no autograd, all in FP64."""
    total = x.double() if y is None else x.double() + y.double()
    r = 1 / (total.square().mean(-1, keepdim=True) + EPS).sqrt()
    g = grad_out.double() * weight.double()
    grad = r * g - total * r**3 * (g * total).mean(-1, keepdim=True)
    return [total, total * r * weight, grad + grad_sum.double(), (grad_out.double() * total * r).flatten(0, -2).sum(0)]


@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 37), (1, 1, 1), (600, 8)], ids=str)
@pytest.mark.parametrize("adds", [True, False])
def test_sum_norm_and_gradients_equal_the_formula(shape, adds):
    """Odd widths, one token, and more tokens than programs of the backward pass."""
    x, weight = drawn(*shape, seed=1), drawn(shape[-1], seed=3)
    y = drawn(*shape, seed=2) if adds else None
    grad_sum, grad_out = (drawn(*shape, seed=seed).detach() for seed in (4, 5))
    total, normed = add_norm_triton.add_norm_triton(x, y, weight, EPS)
    ((total * grad_sum).sum() + (normed * grad_out).sum()).backward()
    expected = exact(x.detach(), y.detach() if adds else None, weight.detach(), grad_sum, grad_out)
    for found, right in zip((total, normed, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-5 * max(1.0, right.abs().max().item()), rtol=0)
    assert y is None or torch.equal(y.grad, x.grad)


def test_a_stream_in_bf16_has_weights_in_fp32():
    """The norm is of the sum as it was rounded. The interpreter cuts numbers off where a GPU rounds: one place."""
    x, y = (drawn(7, 33, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    weight = drawn(33, seed=3)
    grad_sum, grad_out = (drawn(7, 33, seed=seed, dtype=torch.bfloat16).detach() for seed in (4, 5))
    total, normed = add_norm_triton.add_norm_triton(x, y, weight, EPS)
    grads = torch.autograd.grad((total, normed), (x, y, weight), (grad_sum, grad_out))
    found = (total, normed, *grads)
    assert [each.dtype for each in found] == [torch.bfloat16] * 4 + [torch.float32]
    torch.testing.assert_close(total, x + y, atol=0, rtol=2**-7)
    _, normed_exactly, grad, grad_weight = exact(total.detach(), None, weight.detach(), grad_sum, grad_out)
    for value, right in zip(found[1:], (normed_exactly, grad, grad, grad_weight), strict=True):
        torch.testing.assert_close(value.double(), right, atol=1e-4, rtol=2**-7)


def test_a_stream_wider_than_the_products_stays_wide():
    """As with FP16: the stream is FP32, the sublayer's output and the norm FP16."""
    x, y, weight = drawn(6, 40, seed=1), drawn(6, 40, seed=2, dtype=torch.float16), drawn(40, seed=3)
    with torch.autocast("cpu", torch.float16):
        total, normed = add_norm_triton.add_norm_triton(x, y, weight, EPS)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.float16)
    assert torch.equal(total, x + y)
    (total.sum() + normed.float().square().sum()).backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(x.grad.half(), y.grad)


@pytest.mark.parametrize("adds", [True, False])
def test_the_compiler_sees_it_as_it_is(adds):
    """Schema, shapes, strides and gradients of the fake twin, by torch's own check of custom operators."""
    y = drawn(2, 3, 20, seed=2) if adds else None
    arguments = (drawn(2, 3, 20, seed=1), y, drawn(20, seed=3), EPS, torch.float32)
    torch.library.opcheck(add_norm_triton._add_norm, arguments)


def test_the_same_bits_each_time():
    gradients = []
    for _ in range(2):
        x, y, weight = drawn(600, 16, seed=1), drawn(600, 16, seed=2), drawn(16, seed=3)
        add_norm_triton.add_norm_triton(x, y, weight, EPS)[1].square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_its_record_is_committed():
    record = compare("add_norm", "triton", CPU)
    assert record.passed, record
    assert parity.proven("add_norm", "triton", "fp32", "interpreter", record.version), (
        "TRITON_INTERPRET=1 python benchmarks/parity.py --ops add_norm --write"
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_model_has_the_same_gradients_with_it(policy, compiled):
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    spec = ModelSpec.model_validate(
        {"vocab_size": 30, "hidden": 20, "layers": ["-*-"], "attention": attention, "mlp": {"width": 24}}
    )
    ids_BT = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))
    seq_idx_BT = (torch.arange(12) > 4).int().expand(2, -1).contiguous()
    outcomes = []
    for backend in ("triton", "torch"):
        model = build_model(spec, BackendsSpec(add_norm=backend), seed=0)
        set_policy(model, policy)
        if compiled and backend == "triton":
            torch._dynamo.reset()
            compile_layers(model, whole=True, backend="aot_eager")
        model(ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1)).ce_sum.backward()
        outcomes.append({name: parameter.grad for name, parameter in model.named_parameters()})
    ours, theirs = outcomes
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5 * expected.abs().max().item(), rtol=0, msg=name)
