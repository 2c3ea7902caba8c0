"""Our Triton kernels for experts, in Triton's interpreter, against the definition (make test-kernels)."""

import os

import pytest
import torch
from torch import Tensor, nn

from trainer import parity
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Setting, experts_triton
from trainer.ops.check import compare
from trainer.ops.experts import by_expert, experts_reference
from trainer.ops.narrow import Copy
from trainer.parameters import parameters
from trainer.spec import BackendsSpec

pytestmark = pytest.mark.kernels

CPU = Setting(torch.device("cpu"))
ODD = {"tokens": 301, "hidden": 72, "width": 40, "experts": 5}  # no multiple of any tile


@pytest.fixture(autouse=True)
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    assert experts_triton.unsupported(CPU) is None


def draw(maps: int, top_k: int = 2, *, tokens: int, hidden: int, width: int, experts: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    up = torch.randn(experts, maps * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=generator) / width**0.5
    # The last expert gets nothing, the first one most.
    choice = (
        torch.rand(tokens, experts - 1, generator=generator).mul(torch.arange(experts - 1, 0, -1)).topk(top_k).indices
    )
    weight = torch.rand(tokens, top_k, generator=generator)
    return x, up, down, choice, weight


def values(
    function, x: Tensor, up: Tensor, down: Tensor, choice: Tensor, weight: Tensor, activation: str
) -> list[Tensor]:
    """Output and gradients, for fp64 arguments in fp64."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, up, down, weight)]
    y = function(*leaves[:3], choice, leaves[3], activation)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def by_definition(x, up, down, choice, weight, activation):
    """y[s] = Σ_k weight · down · act(up · x), token by token, in fp64."""
    rows = []
    for s in range(len(x)):
        total = 0
        for e, w in zip(choice[s], weight[s], strict=True):
            before = up[e] @ x[s]
            if activation == "relu2":
                hidden = before.clamp(min=0) ** 2
            else:
                gate, value = before.chunk(2)
                hidden = gate / (1 + torch.exp(-gate)) * value
            total = total + w * (down[e] @ hidden)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(("activation", "maps"), [("relu2", 1), ("swiglu", 2)])
def test_the_kernels_equal_the_definition_in_double_precision(activation: str, maps: int):
    x, up, down, choice, weight = draw(maps, **ODD)
    found = values(experts_triton.experts_triton, x, up, down, choice, weight, activation)
    wide = [tensor.double() for tensor in (x, up, down)]
    expected = values(by_definition, *wide, choice, weight.double(), activation)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert not found[2][-1].any() and not found[3][-1].any(), "an expert without tokens has no gradient"


@pytest.mark.parametrize("turned", [1, 2])
def test_weights_whose_rows_do_not_lie_side_by_side(turned: int):
    """Matrices that are stored as their transposes."""
    given = list(draw(1, **ODD))
    expected = values(experts_triton.experts_triton, *given, "relu2")
    given[turned] = given[turned].transpose(1, 2).contiguous().transpose(1, 2)
    assert not given[turned].clone().is_contiguous()
    found = values(experts_triton.experts_triton, *given, "relu2")
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


def test_the_committed_record_is_of_these_kernels():
    record = compare("experts", "triton", CPU)
    assert record.passed, record
    assert parity.proven("experts", "triton", "fp32", "interpreter", record.version), (
        "TRITON_INTERPRET=1 python benchmarks/parity.py --ops experts --write"
    )


def test_the_same_call_gives_the_same_bits():
    arguments = draw(1, **ODD)
    once, again = (values(experts_triton.experts_triton, *arguments, "relu2") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)])
def test_frozen_experts_get_no_gradient_and_change_no_other(frozen: tuple[int, ...]):
    x, up, down, choice, weight = draw(1, **ODD)
    expected = values(experts_triton.experts_triton, x, up, down, choice, weight, "relu2")
    leaves = [tensor.clone().requires_grad_(index not in frozen) for index, tensor in enumerate((x, up, down, weight))]
    y = experts_triton.experts_triton(*leaves[:3], choice, leaves[3])
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    for index, (leaf, gradient) in enumerate(zip(leaves, expected[1:], strict=True)):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, gradient)


def test_no_tokens_at_all():
    """As a rank of a group that shares experts may have."""
    x, up, down, choice, weight = draw(1, **ODD)
    found = values(experts_triton.experts_triton, x[:0], up, down, choice[:0], weight[:0], "relu2")
    assert found[0].shape == (0, x.shape[1]) and not found[2].any() and not found[3].any()


def test_gradients_of_weights_can_be_added_to_what_is_there():
    from trainer.kernels.grouped import outer

    x, up, _, choice, _ = draw(1, **ODD)
    routing = by_expert(choice, ODD["experts"])
    ends = routing.count_E.cumsum(0).to(torch.int32)
    a = torch.randn(choice.numel(), up.shape[1], generator=torch.Generator().manual_seed(1))
    before = torch.randn(up.shape, generator=torch.Generator().manual_seed(2))
    token = routing.order_R // routing.top_k
    found = outer(a, x, ends, before.clone(), source_b_R=token, add=True)
    for e, end in enumerate(ends.tolist()):
        rows = slice(end - int(routing.count_E[e]), end)
        expected = before[e].double() + a[rows].double().T @ x[token[rows]].double()
        torch.testing.assert_close(found[e].double(), expected, rtol=1e-5, atol=1e-4)


def test_the_compiler_sees_the_kernels_as_they_are():
    """Shapes, strides and gradients of the operators' fake twins, by torch's own check of custom operators."""
    x, up, down, choice, weight = draw(2, tokens=9, hidden=16, width=16, experts=3)
    routing = by_expert(choice, 3)
    leaves = [tensor.requires_grad_() for tensor in (x, up, down, weight)]
    arguments = (*leaves, routing.order_R, routing.count_E.cumsum(0).to(torch.int32), "swiglu", False)
    torch.library.opcheck(experts_triton.OPERATORS.forward, arguments, test_utils=("test_schema", "test_faketensor"))
    y, before = experts_triton.OPERATORS.forward(*arguments)
    tensors = [tensor.detach() for tensor in (torch.ones_like(y), *leaves, *arguments[4:6], before)]
    for flags in ((True, True, False), (False, True, False)):
        backward = (*tensors, *flags)
        torch.library.opcheck(
            experts_triton.OPERATORS.backward, backward, test_utils=("test_schema", "test_faketensor")
        )


def test_close_to_the_reference_of_the_registry():
    arguments = draw(1, **ODD)
    expected = values(experts_reference, *arguments, "relu2")
    found = values(experts_triton.experts_triton, *arguments, "relu2")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


class Stacks(nn.Module):
    """Weights of experts with copies in the number format of `narrow`, which take gradients."""

    def __init__(self, up: Tensor, down: Tensor, narrow: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.copies: dict[str, Tensor] = {}
        self.refreshed = [Copy(self, name, adds=True) for name in ("up", "down")]
        for copy in self.refreshed:
            copy.refresh(narrow)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_gradients_are_summed_in_the_products_over_micro_batches(activation: str, compiles: bool):
    """As autograd sums them, to the rounding of fp32."""
    x, up, down, choice, weight = draw(1 + (activation == "swiglu"), tokens=61, hidden=24, width=16, experts=4)
    stacks, plain = Stacks(up.clone(), down.clone(), torch.float32), Stacks(up.clone(), down.clone(), torch.float32)

    def summing(*tensors: Tensor) -> Tensor:
        return experts_triton.experts_triton(*tensors, activation, adds=True)

    run = torch.compile(summing, backend="aot_eager", fullgraph=True) if compiles else summing
    of_tokens: list[list[Tensor]] = []
    for number in range(3):
        tokens = [(x + number).requires_grad_() for _ in range(2)]
        found = run(tokens[0], stacks.copies["up"], stacks.copies["down"], choice, weight)
        expected = experts_triton.experts_triton(tokens[1], plain.up, plain.down, choice, weight, activation)
        for y in (found, expected):
            y.square().sum().backward()
        of_tokens.append([token.grad for token in tokens])
    assert all(torch.equal(*pair) for pair in of_tokens)
    assert all(copy.grad is None for copy in stacks.copies.values())
    for mine, theirs in ((stacks.up.grad, plain.up.grad), (stacks.down.grad, plain.down.grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


def test_a_model_adds_in_the_products_what_it_would_round_outside():
    """FP16 gradients of weights, summed after they were rounded, against sums within the products, which are FP32."""
    spec = ModelSpec(vocab_size=64, hidden=16, layers=["E"], moe={"num_experts": 4, "top_k": 2, "expert_width": 16})
    names = {p.name for p in parameters(spec) if p.per_expert}
    gradients = []
    for adding in ((), names):
        model = build_model(spec, BackendsSpec(experts="triton"), seed=0)
        model.keep_copies(names, adding)
        (moe,) = model.moe_sublayers()
        assert moe.product_adds == bool(adding)
        for number in range(3):
            ids_BT = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(number))
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(ids_BT, torch.zeros_like(ids_BT), ids_BT)
            (64 * output.ce_sum).backward()
        assert moe.copies["down_EDF"].dtype == torch.float16
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
        model(
            ids_BT, torch.zeros_like(ids_BT), ids_BT
        ).ce_sum.backward()  # without autocast: no copy, and autograd sums
        assert all(p.grad is not None for p in model.parameters() if p.dim() == 3)
    for name, rounded in gradients[0].items():
        exact = gradients[1][name]
        assert exact.dtype == torch.float32
        if name in names:
            assert not torch.equal(exact, rounded) and not torch.equal(exact, exact.half().float())
        torch.testing.assert_close(exact, rounded, rtol=2e-3, atol=2e-3 * rounded.abs().max().item())
