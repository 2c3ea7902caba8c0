"""Muon's calls of quack's symmetric product: with a stand-in that computes what it says it does, and by signature."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from named import EXPECTED, MODEL, Named
from torch import Tensor

from trainer.ops import OPS, Setting, orthogonalise_quack, packages
from trainer.ops.check import compare
from trainer.ops.orthogonalise import iteration, orthogonalise_
from trainer.ops.orthogonalise_quack import KERNEL
from trainer.ops.orthogonalise_quack import orthogonalise_quack as by_quack
from trainer.optim import build_optimizers, fastest
from trainer.optim.fastest import FastestByShape
from trainer.spec import OptimizerSpec


class Symmetric:
    """α·A·B + β·C for a B that is A transposed; `mirrors` False: the upper half is not written."""

    def __init__(self, *, mirrors: bool = True) -> None:
        self.calls, self.mirrors = 0, mirrors

    def __call__(self, A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        assert A.dim() == 3 and B.data_ptr() == A.data_ptr() and B.shape == A.mT.shape
        assert all(size % 8 == 0 for size in A.shape[1:]), "16 bytes at a time"
        assert type(alpha) is float and type(beta) is float, "it compiles another kernel for what is not"
        self.calls += 1
        found = alpha * (A @ B) + (0 if C is None else beta * C)
        return found if self.mirrors else found.tril()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Symmetric:
    function = Symmetric()
    monkeypatch.setitem(packages._KERNELS, KERNEL, packages.Kernel(function, frozenset()))
    return function


def spectral(x_Nmn: Tensor, coefficients: Any, steps: int) -> Tensor:
    """The same polynomials of the singular values, in float64."""
    U, S, Vh = torch.linalg.svd(x_Nmn.double(), full_matrices=False)
    per_step, safety = iteration(coefficients, steps)
    S = S / (S.norm(dim=-1, keepdim=True) * safety)
    for a, b, c in per_step:
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag_embed(S) @ Vh


@pytest.mark.parametrize("coefficients", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("shape", [(2, 40, 40), (3, 24, 40), (1, 40, 24)])
def test_is_the_polynomial_of_the_singular_values(stand_in: Symmetric, shape: tuple[int, ...], coefficients: Any):
    x_Nmn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        by_quack(x_Nmn.clone(), coefficients, 5).double(), spectral(x_Nmn, coefficients, 5), atol=2e-4, rtol=1e-4
    )
    assert stand_in.calls == 2 * 5


def test_rows_that_are_not_aligned_are_left_to_torch(stand_in: Symmetric):
    x_Nmn = torch.randn(2, 36, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_quack(x_Nmn.clone(), "polar_express", 5), orthogonalise_(x_Nmn.clone(), "polar_express", 5))
    assert stand_in.calls == 0


@pytest.mark.parametrize("mirrors", [True, False])
def test_the_proof_tells_a_right_kernel_from_a_wrong_one(
    stand_in: Symmetric, monkeypatch: pytest.MonkeyPatch, mirrors: bool
):
    backends = OPS["orthogonalise"].backends
    monkeypatch.setitem(backends, "quack", replace(backends["quack"], unsupported=lambda setting: None))
    stand_in.mirrors = mirrors
    record = compare("orthogonalise", "quack", Setting(torch.device("cpu"), torch.bfloat16))
    assert record.passed == mirrors, record
    assert record.forward_error < 0.5 * record.tolerance or not mirrors
    assert stand_in.calls > 0


def test_each_shape_gets_the_faster_function_and_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    timed: list[tuple[int, ...]] = []

    def milliseconds(function: Any, x_Nmn: Tensor, *_: object) -> float:
        timed.append(tuple(x_Nmn.shape))
        large = x_Nmn.shape[1] >= 32
        return 1.0 if large == (function is by_first) else 2.0

    def by_first(x_Nmn: Tensor, coefficients: str, steps: int) -> Tensor:
        return x_Nmn + 1

    monkeypatch.setattr(fastest, "milliseconds", milliseconds)
    function = FastestByShape(by_first, lambda x_Nmn, coefficients, steps: x_Nmn - 1)
    function.choose({(32, 32): 3, (16, 16): 1}, torch.empty(0), "polar_express", 5)
    assert timed == [(3, 32, 32)] * 2 + [(1, 16, 16)] * 2
    for size, expected in ((32, 1), (16, -1), (32, 1), (64, -1)):
        assert function(torch.zeros(1, size, size), "polar_express", 5).unique().tolist() == [expected]
    assert len(timed) == 4


def test_ranks_whose_clocks_differ_keep_equal_copies(stand_in: Symmetric, monkeypatch: pytest.MonkeyPatch):
    """They update weights that all of them have, and nothing would bring these together again."""
    told: list[Any] = []

    def weights(slower: Any, agree: Any) -> list[Tensor]:
        monkeypatch.setattr(fastest, "milliseconds", lambda function, *_: float(function is slower))
        network = Named({name: expected[0] for name, expected in EXPECTED.items()})
        optimizers = build_optimizers(network, OptimizerSpec(), MODEL, orthogonalise=by_quack, agree=agree)
        for number, parameter in enumerate(optimizers.parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizers.step()
        return list(network.parameters())

    first = weights(orthogonalise_, lambda value: told.append(value) or value)
    assert any(told[0].values()) and stand_in.calls > 0
    alone, agreed = weights(by_quack, lambda value: value), weights(by_quack, lambda value: told[0])
    assert all(torch.equal(*pair) for pair in zip(first, agreed, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, alone, strict=True))


def test_muon_steps_by_it(stand_in: Symmetric, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fastest, "milliseconds", lambda function, *_: float(function is orthogonalise_))
    found = []
    for function in (by_quack, orthogonalise_):
        network = Named({name: expected[0] for name, expected in EXPECTED.items()})
        optimizers = build_optimizers(network, OptimizerSpec(), MODEL, orthogonalise=function)
        for number, parameter in enumerate(optimizers.parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizers.step()
        found.append(list(network.parameters()))
    assert stand_in.calls > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_rules_it_out(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.device("cuda")
    assert orthogonalise_quack.unsupported(Setting(torch.device("cpu"), torch.bfloat16)) == "needs a CUDA device"
    for capability, dtype, reason in (
        ((8, 0), torch.bfloat16, "needs compute"),
        ((9, 0), torch.float32, "runs in bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=capability: have)
        assert reason in (orthogonalise_quack.unsupported(Setting(gpu, dtype)) or "")


def test_the_real_function_takes_these_arguments():
    if problem := packages.kernel_problem(KERNEL):
        pytest.skip(problem)
    real = inspect.signature(packages.kernel(KERNEL).function).parameters
    assert set(inspect.signature(Symmetric.__call__).parameters) - {"self"} <= set(real)
