"""Our Triton kernel for Engram's look-up, in Triton's interpreter, against the definition (make test-kernels)."""

import os

import pytest
import torch

from trainer import parity
from trainer.kinds.engram import EngramSpec
from trainer.kinds.ngrams import multipliers, table_primes
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Documents, Setting, engram_triton
from trainer.ops.check import compare
from trainer.ops.engram import Hash, engram_torch
from trainer.recomputing import set_policy
from trainer.spec import BackendsSpec

pytestmark = pytest.mark.kernels

CPU = Setting(torch.device("cpu"))


@pytest.fixture(autouse=True)
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    assert engram_triton.unsupported(CPU) is None


def hash_of(orders: int, heads: int, rows: int, classes: list[int]) -> tuple[Hash, int]:
    """Constants and the rows of all tables."""
    spec = EngramSpec(layer=0, max_order=orders, num_heads=heads, rows_per_head=rows, width_per_order=heads)
    primes = table_primes([spec])[0]
    offsets = [sum(primes[:table]) for table in range(len(primes))]
    numbers = (classes, multipliers(26, orders, max(classes) + 1), primes, offsets)
    return Hash(*(torch.tensor(number, dtype=torch.int64) for number in numbers)), sum(primes)


def rows_in_python(ids: list[list[int]], documents: list[list[int]], hash: Hash) -> list[list[list[int]]]:
    """The formula in Python's integers, which have no size."""
    classes, factors, primes, offsets = (constant.tolist() for constant in hash)
    heads = len(primes) // (len(factors) - 1)
    found: list[list[list[int]]] = []
    for tokens, numbers in zip(ids, documents, strict=True):
        found.append([])
        for t, document in enumerate(numbers):
            mixed, here = classes[tokens[t]] * factors[0], []
            for back in range(1, len(factors)):
                reached = t >= back and numbers[t - back] == document
                mixed ^= classes[tokens[t - back] if reached else 0] * factors[back]
                assert mixed < 2**63
                here += [mixed % primes[j] + offsets[j] for j in range((back - 1) * heads, back * heads)]
            found[-1].append(here)
    return found


@pytest.mark.parametrize(
    ("orders", "heads", "rows", "width", "vocab", "length"),
    [(2, 1, 7, 3, 50, 1), (3, 8, 500_000, 1, 32768, 37), (4, 3, 30, 130, 2, 9), (8, 2, 11, 16, 131072, 20)],
)
def test_rows_values_and_gradient_equal_the_formula(
    orders: int, heads: int, rows: int, width: int, vocab: int, length: int
):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randperm(vocab, generator=generator).tolist()  # so that the class of what came before is not 0
    hash, count = hash_of(orders, heads, rows, classes)
    ids_BT = torch.randint(vocab, (3, length), generator=generator)
    ids_BT[0, :] = classes.index(max(classes))  # the largest products
    seq_idx_BT = (torch.rand(3, length, generator=generator) < 0.3).int().cumsum(1).int()
    table_RW = torch.randn(count, width, generator=generator).requires_grad_()

    found, row_BTJ = engram_triton._engram(ids_BT, seq_idx_BT, *hash, table_RW, torch.float32)
    expected = torch.tensor(rows_in_python(ids_BT.tolist(), seq_idx_BT.tolist(), hash))
    assert row_BTJ.dtype == torch.int64 and torch.equal(row_BTJ, expected)
    assert torch.equal(found, table_RW.detach()[expected].flatten(2))

    direction = torch.randn(found.shape, generator=generator)
    (found * direction).sum().backward()
    gradient = torch.zeros(count, width, dtype=torch.float64)
    gradient.index_add_(0, expected.flatten(), direction.double().view(-1, width))
    torch.testing.assert_close(table_RW.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_equal_to_torch_to_the_last_bit_whatever_the_strides():
    hash, count = hash_of(3, 2, 40, [token // 3 for token in range(60)])
    ids_BT = torch.randint(60, (33, 2), generator=torch.Generator().manual_seed(0)).T
    documents = Documents((torch.arange(33) > 12).int().expand(2, -1))
    assert not ids_BT.is_contiguous() and not documents.seq_idx_BT.is_contiguous()
    outcomes = []
    for function in (engram_triton.engram_triton, engram_torch):
        table_RW = torch.randn(count, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        found = function(ids_BT, documents, hash, table_RW)
        found.transpose(1, 2).square().sum().backward()
        outcomes.append((found.detach(), table_RW.grad))
    assert all(torch.equal(mine, right) for mine, right in zip(*outcomes, strict=True))


def test_frozen_tables_have_no_gradient():
    hash, count = hash_of(2, 1, 7, [0, 1, 2])
    documents = Documents.one_per_row(1, 4)
    found = engram_triton.engram_triton(torch.tensor([[1, 2, 0, 1]]), documents, hash, torch.randn(count, 4))
    assert not found.requires_grad


@pytest.mark.parametrize(("policy", "compiles"), [("none", False), ("full", False), ("full", True)])
def test_a_model_has_the_losses_and_gradients_of_torch(policy: str, compiles: bool):
    """Its other operations are the same ones, so all of it is equal to the last bit."""
    spec = ModelSpec(
        vocab_size=50,
        hidden=16,
        layers=["N-"],
        mlp={"width": 16},
        engram=[{"layer": 0, "rows_per_head": 20, "width_per_order": 8, "num_heads": 2, "compress_tokens": False}],
    )
    ids_BT = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))
    seq_idx_BT = (torch.arange(20) > 7).int().expand(2, -1).contiguous()
    outcomes = []
    for backend in ("triton", "torch"):
        model = build_model(spec, seed=0, backends=BackendsSpec(engram=backend, add_norm="torch"))
        set_policy(model, policy)
        if compiles:
            torch.compiler.reset()  # layers of the other backend would be compiled anew until a limit
            compile_layers(model, whole=True, backend="aot_eager")
        output = model(ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1))
        output.ce_sum.backward()
        outcomes.append([output.ce_sum.detach(), *(parameter.grad for parameter in model.parameters())])
    assert outcomes[0][-1] is not None and all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def test_the_committed_record_is_of_this_kernel():
    record = compare("engram", "triton", CPU)
    assert record.passed, record
    assert parity.proven("engram", "triton", "fp32", "interpreter", record.version), (
        "TRITON_INTERPRET=1 python benchmarks/parity.py --ops engram --write"
    )


def test_the_compiler_sees_the_kernel_as_it_is():
    """Shapes, strides and gradient of the operator's fake twin, by torch's own check of custom operators."""
    hash, count = hash_of(3, 2, 11, list(range(9)))
    table_RW = torch.randn(count, 6, requires_grad=True)
    ids_BT, seq_idx_BT = torch.arange(8).view(2, 4), torch.zeros(2, 4, dtype=torch.int32)
    arguments = (ids_BT, seq_idx_BT, *hash, table_RW, torch.float32)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(engram_triton._engram, arguments, test_utils=utils)
