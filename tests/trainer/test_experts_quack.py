"""Our calls of quack-kernels: with stand-ins that compute what its functions are documented to, and by signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainer.ops import Setting, experts_quack, packages
from trainer.ops.experts import by_expert, experts_reference
from trainer.spec import ModelSpec
from trainer.specbase import parse

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 37, 24, 16, 5, 2


def segments(bounds: Tensor) -> list[slice]:
    assert bounds.dtype == torch.int32 and bounds[0] == 0
    return [slice(a, b) for a, b in pairwise(bounds.tolist())]


def gemm(A: Tensor, B: Tensor, out=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None) -> Tensor:
    """By rows: A[idx] · B[e], rows of e. By depth: A[:, idx] · B over the rows of e, for each e."""
    if A_idx is not None:
        assert A_idx.dtype == torch.int32
    if cu_seqlens_m is not None:
        assert A.stride(-1) == 1
        rows = A if A_idx is None else A[A_idx]
        parts = [rows[part] @ B[e] for e, part in enumerate(segments(cu_seqlens_m))]
        return torch.cat(parts)
    assert A.stride(-2) == 1 and B.stride(-1) == 1, "what it demands of operands that are cut by depth"
    columns = A if A_idx is None else A[:, A_idx]
    for e, part in enumerate(segments(cu_seqlens_k)):
        out[e] = columns[:, part] @ B[part]
    return out


def gemm_act(A, B, activation=None, cu_seqlens_m=None, A_idx=None) -> tuple[Tensor, Tensor]:
    assert activation == "relu_sq"
    before = gemm(A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
    return before, before.clamp(min=0) ** 2


def gemm_dact(
    A, B, PreAct, activation=None, colvec_scale=None, colvec_reduce=False, cu_seqlens_m=None, A_idx=None
) -> tuple[Tensor, Tensor, Tensor]:
    assert activation == "relu_sq" and colvec_reduce and colvec_scale.dtype == torch.float32
    grad = gemm(A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
    positive = PreAct.clamp(min=0)
    scale = colvec_scale[:, None].to(grad.dtype)
    return grad * scale * 2 * positive, positive**2 * scale, (grad * positive**2).sum(1).float()


STAND_INS = {experts_quack.PRODUCT: gemm, experts_quack.ACTIVATED: gemm_act, experts_quack.DERIVED: gemm_dact}


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, function in STAND_INS.items():
        monkeypatch.setitem(packages._KERNELS, path, packages.Kernel(function, frozenset()))


def draw() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    up = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
    choice = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOP_K).indices  # the last expert gets nothing
    return x, up, down, choice, torch.rand(TOKENS, TOP_K, generator=generator)


def values(function: Callable[..., Tensor], frozen: int | None = None) -> list[Tensor | None]:
    x, up, down, choice, weight = draw()
    leaves = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate((x, up, down, weight))]
    y = function(*leaves[:3], choice, leaves[3])
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("frozen", [None, 1, 2])
def test_our_calls_compute_the_reference(stands_in: None, frozen: int | None):
    found, expected = values(experts_quack.experts_quack, frozen), values(experts_reference, frozen)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert found[0].shape == (TOKENS, HIDDEN)


def test_the_compiler_sees_the_operators_as_they_are(stands_in: None):
    x, up, down, choice, weight = draw()
    routing = by_expert(choice, EXPERTS)
    arguments = (x, up, down, weight, routing.order_R, routing.count_E.cumsum(0).to(torch.int32), "relu2", False)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(experts_quack.OPERATORS.forward, arguments, test_utils=utils)
    y, before = experts_quack.OPERATORS.forward(*arguments)
    for flags in ((True, True, False), (False, True, False)):
        backward = (torch.ones_like(y), *arguments[:-2], before, *flags)
        torch.library.opcheck(experts_quack.OPERATORS.backward, backward, test_utils=utils)


def test_a_model_with_gates_is_passed_over_and_computed_by_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    moe = {"num_experts": 4, "top_k": 2, "expert_width": 32}
    shape = {"vocab_size": 64, "hidden": 32, "layers": ["E"]}
    gpu = torch.device("cuda", 0)

    def said(moe: dict[str, object]) -> str | None:
        return experts_quack.unsupported(Setting(gpu, torch.bfloat16, parse(ModelSpec, shape | {"moe": moe})))

    assert said(moe | {"activation": "swiglu"}) == "fuses squared ReLU, the model has swiglu"
    assert said(moe | {"expert_width": 36}) == "sides are multiples of 8, the model is 32 and 36 wide"
    assert experts_quack.unsupported(Setting(gpu)) == "computes bf16 and fp16, not fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert said(moe) == "needs compute capability 9.0, this GPU has 8.0"
    x, up, down, choice, weight = draw()
    gated = torch.cat([up, up], dim=1)
    found = experts_quack.experts_quack(x, gated, down, choice, weight, "swiglu")
    torch.testing.assert_close(found, experts_reference(x, gated, down, choice, weight, "swiglu"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("path", "function"), STAND_INS.items())
def test_the_real_functions_take_these_arguments(path: str, function: Callable[..., object]):
    if problem := packages.kernel_problem(path):
        pytest.skip(problem)
    real = inspect.signature(packages.kernel(path).function).parameters
    assert set(inspect.signature(function).parameters) <= set(real)
