"""Our Triton kernels for the router, in Triton's interpreter, against the definition (make test-kernels)."""

import os

import pytest
import torch
from torch import Tensor

from trainer import parity
from trainer.ops import Setting, router_triton
from trainer.ops.check import compare
from trainer.ops.router import Routed, router_reference

pytestmark = pytest.mark.kernels

CPU = Setting(torch.device("cpu"))


@pytest.fixture(autouse=True)
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    assert router_triton.unsupported(CPU) is None


def draw(tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, experts, generator=generator), torch.randn(experts, generator=generator) * 0.3


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(70, 64, 6), (33, 9, 1), (1, 130, 16), (64, 4, 4), (37, 500, 16)]
)
def test_forward_and_backward_equal_the_definition(
    tokens: int, experts: int, top_k: int, softmax: bool, renormalise: bool
):
    logits, bias = draw(tokens, experts)
    options = {"softmax": softmax, "renormalise": renormalise}
    of_scores, of_weights = torch.randn(tokens, experts), torch.randn(tokens, experts)

    def values(function, dtype: torch.dtype) -> tuple[Routed, Tensor]:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        routed = function(leaf, bias.to(dtype), top_k, 2.5, **options)
        weighted = routed.weight_SK * of_weights.gather(1, routed.expert_SK)  # whatever the order of a token's experts
        (weighted.sum() + (routed.score_SE * of_scores).sum()).backward()
        return routed, leaf.grad

    found, gradient = values(router_triton.router_triton, torch.float32)
    expected, wide = values(router_reference, torch.float64)
    assert found.expert_SK.dtype == found.load_E.dtype == torch.int64
    assert torch.equal(found.expert_SK.sort(-1).values, expected.expert_SK.sort(-1).values)
    assert torch.equal(found.load_E, expected.load_E)
    torch.testing.assert_close(found.score_SE.double(), expected.score_SE, rtol=1e-5, atol=1e-6)
    mine, theirs = (
        torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, r.expert_SK, r.weight_SK.detach().double())
        for r in (found, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wide, rtol=1e-4, atol=1e-5)


def test_the_bias_decides_the_choice_alone():
    logits, bias = draw(20, 8)
    bias[5] = 10
    found = router_triton.router_triton(logits, bias, 2, 1.0, softmax=False, renormalise=False)
    assert (found.expert_SK[:, 0] == 5).all(), "the best comes first"
    torch.testing.assert_close(found.weight_SK[:, 0], torch.sigmoid(logits[:, 5]))


def test_of_equal_scores_the_first_are_chosen():
    found = router_triton.router_triton(torch.zeros(3, 8), torch.zeros(8), 3, 1.0, softmax=True, renormalise=True)
    assert found.expert_SK.tolist() == [[0, 1, 2]] * 3 and found.load_E.tolist() == [3, 3, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("softmax", [False, True])
def test_a_token_that_is_not_a_number_chooses_experts_that_exist_and_spoils_no_other(softmax: bool):
    logits, bias = draw(40, 9)
    expected = router_triton.router_triton(logits, bias, 3, 1.0, softmax=softmax, renormalise=True)
    logits[7] = torch.nan
    found = router_triton.router_triton(logits, bias, 3, 1.0, softmax=softmax, renormalise=True)
    assert ((found.expert_SK >= 0) & (found.expert_SK < 9)).all() and len(set(found.expert_SK[7].tolist())) == 3
    assert found.weight_SK[7].isnan().all(), "the loss shall show it"
    others = torch.arange(40) != 7
    assert torch.equal(found.weight_SK[others], expected.weight_SK[others])
    assert found.load_E.sum() == 40 * 3


def test_one_of_the_gradients_alone():
    logits, bias = draw(10, 8)
    for which in ("score_SE", "weight_SK"):
        gradients = []
        for function in (router_triton.router_triton, router_reference):
            leaf = logits.clone().requires_grad_()
            getattr(function(leaf, bias, 8, 1.0, softmax=True, renormalise=False), which).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_committed_record_is_of_these_kernels():
    record = compare("router", "triton", CPU)
    assert record.passed, record
    assert parity.proven("router", "triton", "fp32", "interpreter", record.version), (
        "TRITON_INTERPRET=1 python benchmarks/parity.py --ops router --write"
    )


def test_the_compiler_sees_the_kernels_as_they_are():
    """Shapes, strides and gradients of the operators' fake twins, by torch's own check of custom operators."""
    logits, bias = draw(10, 8)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(router_triton._router, (logits, bias, 3, 2.5, False, True), test_utils=utils)
    scores, experts, weights, _ = router_triton._router(logits, bias, 3, 2.5, False, True)
    arguments = (scores, experts, scores, weights, 2.5, False, True)
    torch.library.opcheck(router_triton._router_backward, arguments, test_utils=utils)
