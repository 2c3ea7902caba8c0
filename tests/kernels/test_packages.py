"""Our use of Triton and Transformer Engine packages against the packages themselves, on a CPU (make test-kernels)."""

import inspect
import os
from unittest.mock import patch

import pytest
import torch

from trainer import parity
from trainer.ops import Setting, experts_te, packages, ssd_mamba_ssm
from trainer.ops.check import compare, launchable

pytestmark = pytest.mark.kernels

CPU = Setting(torch.device("cpu"))


@pytest.fixture
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    assert ssd_mamba_ssm.unsupported(CPU) is None


@pytest.fixture
def te():
    found = packages.load(experts_te.MODULE)
    assert not isinstance(found, str), found
    return found


@pytest.mark.timeout(900)
def test_mamba_ssm_equals_the_reference_and_keeps_documents_apart(interpreted):
    """Forward, backward, ragged and one-token documents, a row that begins in the middle of one."""
    record = compare("ssd", "mamba_ssm", CPU)
    assert record.passed, record
    assert record.leak < 1e-5  # log-decays are summed across documents in fp32, so their last bits move
    assert parity.proven("ssd", "mamba_ssm", "fp32", "interpreter", record.version), (
        "TRITON_INTERPRET=1 python benchmarks/parity.py --ops ssd --write"
    )


def test_the_compiler_sees_the_scan_as_it_is(interpreted):
    """Shapes, strides and gradients of the operator's fake twin, by torch's own check of custom operators."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in range(3))
    dt, A, D = torch.rand(1, 20, 1, requires_grad=True), -torch.ones(1), torch.ones(1, requires_grad=True)
    arguments = (x, dt, A.requires_grad_(), B, C, D, torch.zeros(1, 20, dtype=torch.int32), 16)
    with launchable(CPU):
        torch.library.opcheck(ssd_mamba_ssm._scan, arguments, test_utils=("test_schema", "test_faketensor"))


def test_transformer_engine_takes_our_calls(te):
    inspect.signature(te.GroupedLinear).bind(4, 16, 32, bias=False, params_dtype=torch.bfloat16, device="meta")
    inspect.signature(te.GroupedLinear.forward).bind(None, torch.empty(0), [1, 2])
    inspect.signature(te.Fp8Padding).bind(4)
    inspect.signature(te.Fp8Padding.forward).bind(None, torch.empty(0), [1, 2])
    inspect.signature(te.Fp8Unpadding.forward).bind(None, torch.empty(0), [1, 2])
    inspect.signature(te.autocast).bind(enabled=False, recipe=None)
    assert experts_te._recipe() is None and experts_te._stateless_fp8() is False


@pytest.mark.parametrize(("name", "stateless"), [("Float8CurrentScaling", True), ("DelayedScaling", False)])
def test_recipes_with_a_history_keep_the_experts_in_bf16(te, name, stateless):
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    with (
        patch.object(FP8GlobalStateManager, "is_fp8_enabled", return_value=True),
        patch.object(FP8GlobalStateManager, "get_fp8_recipe", return_value=getattr(recipe, name)()),
    ):
        assert experts_te._stateless_fp8() is stateless


def test_the_carrier_reads_our_weights(te):
    """Its constructor requires a GPU, but does not use it for parameters on "meta"."""
    experts_te._carrier.cache_clear()
    weight_EFD = torch.randn(3, 32, 16, requires_grad=True)
    with patch("torch.cuda.is_available", return_value=True):
        carrier = experts_te._carrier(3, 32, 16, torch.float32, torch.device("cpu"))
    experts_te._carrier.cache_clear()
    assert list(carrier.parameters()) == []
    for e, weight_FD in enumerate(weight_EFD.unbind(0)):
        setattr(carrier, f"weight{e}", weight_FD)
    found = carrier._get_weight_tensors()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weight_EFD, found, strict=True))
    sum(tensor.sum() for tensor in found).backward()
    assert weight_EFD.grad.eq(1).all()
