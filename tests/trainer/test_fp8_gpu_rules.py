"""torch's own rules for operands of scaled products on a GPU, which it also checks on tensors without data.

A CPU's products accept more layouts than a GPU's, so running them here would prove nothing; these checks are the ones
that torch applies before it calls a kernel.
"""

from __future__ import annotations

import pytest
import torch
from autograd_context import Context
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.fp8.experts import Fp8GroupedProduct
from trainer.fp8.gemm import aligned, inner_major, outer_major
from trainer.fp8.linear import Fp8Product, Recipe
from trainer.fp8.scaling import E4M3, E5M2, by_rows, by_tiles

SHAPES = [(4096, 2048, 1280), (100, 256, 128), (33, 128, 2048)]  # tokens, inputs, outputs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("scaling", "gradient"), [("delayed", E5M2), ("current", E5M2), ("current", E4M3), ("block128", E4M3)]
)
def test_a_gpu_would_take_the_operands_of_all_three_products(scaling, gradient, shape):
    tokens, inputs, outputs = shape
    recipe = Recipe(scaling, E4M3, gradient, 0, "torch")
    with FakeTensorMode():
        x = torch.empty(tokens, inputs, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(outputs, inputs, device="cuda")
        slots = torch.empty(2, 3, device="cuda").unbind(0)
        y = Fp8Product.forward(context := Context(), x, w, *slots, recipe)
        assert (y.shape, y.dtype) == ((tokens, outputs), torch.bfloat16)
        grad_x, grad_w, *_ = Fp8Product.backward(context, torch.empty_like(y))
        assert (grad_x.shape, grad_x.dtype) == (x.shape, torch.bfloat16)
        assert (grad_w.shape, grad_w.dtype) == (w.shape, torch.float32)


def test_those_rules_refuse_what_a_gpu_would_refuse():
    """Otherwise the test above could not fail."""
    with FakeTensorMode():
        a, one = torch.empty(32, 64, dtype=E4M3, device="cuda"), torch.empty((), device="cuda")
        with pytest.raises(RuntimeError, match="col_major"):
            torch._scaled_mm(a, torch.empty(64, 32, dtype=E4M3, device="cuda"), one, one, out_dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            torch._scaled_mm(a[:, :40], a[:, :40].t(), one, one, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_a_gpu_would_take_the_operands_of_the_experts(scaling):
    recipe = Recipe(scaling, E4M3, E4M3, 0, "torch")
    with FakeTensorMode():
        x = torch.empty(6 * 4096, 2048, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(64, 256, 2048, device="cuda")
        ends = torch.empty(64, dtype=torch.int32, device="cuda")
        slots = torch.empty(2, 3, device="cuda").unbind(0)
        y = Fp8GroupedProduct.forward(context := Context(), x, w, ends, *slots, recipe)
        assert (y.shape, y.dtype) == ((6 * 4096, 256), torch.bfloat16)
        grad_x, grad_w, *_ = Fp8GroupedProduct.backward(context, torch.empty_like(y))
        assert grad_x.shape == x.shape and (grad_w.shape, grad_w.dtype) == (w.shape, torch.float32)


def test_block_scales_lie_in_memory_as_cublas_reads_them():
    """1×128: [M, J] with strides (1, M). 128×128 of the second operand: [J to a multiple of 4, G], strides (1, J')."""
    x, w = by_rows(torch.randn(48, 640), E4M3), by_tiles(torch.randn(256, 640), E4M3)
    assert outer_major(x.inverse).stride() == (1, 48) and torch.equal(outer_major(x.inverse), x.inverse)
    scales = inner_major(w.inverse)
    assert scales.shape == (8, 2) and scales.stride() == (1, 8)
    assert torch.equal(scales[:5], w.inverse.t()) and (scales[5:] == 0).all()
    assert aligned(torch.zeros(3, 40).to(E5M2), 16).shape == (3, 48)
