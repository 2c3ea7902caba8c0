"""A linear layer whose three products (forward, gradient of the input, gradient of the weight) are FP8.

The weight remains the same FP32 parameter under its own name, so optimizers and checkpoints are not affected. It is
cast at each use, also in the backward pass: keeping the FP8 copy would keep a gathered weight alive under FSDP. With
128-blocks an operand is cast once per contraction direction, from the same original.

Amaxes are collected as running maxima of the step, so neither several micro-batches nor recomputation under activation
checkpointing count anything twice; scales of the delayed recipe change between steps only (`state.py`).

Legend: M tokens, K inputs, N outputs; slots 0 input, 1 weight, 2 gradient of the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer.fp8.gemm import PRODUCTS
from trainer.fp8.scaling import LARGEST, Scaled, by_rows, by_tensor, by_tiles, tensor_scale
from trainer.model.linear import product
from trainer.ops.experts import compute_dtype


class Recipe(NamedTuple):
    """How operands are cast: scaling ("delayed", "current", "block128"), formats, margin and implementation."""

    scaling: str
    forward: torch.dtype
    gradient: torch.dtype
    margin: int
    implementation: str


class Slots(NamedTuple):
    """This layer's slice of the FP8 state, fp32 [3] each: amax of the step so far, and the delayed recipe's scales."""

    amax: Tensor
    scale: Tensor


class Fp8Linear(nn.Linear):
    """Replaces nn.Linear in place: `convert` sets the class and these two attributes.

    In evaluation mode the product is not FP8 and the state does not change.
    """

    recipe: Recipe
    slots: Slots

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return product(x, self.weight, self.bias)
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x_MK = x.to(dtype).flatten(0, -2)
            y_MN = Fp8Product.apply(x_MK, self.weight, self.slots.amax, self.slots.scale, self.recipe)
            if self.bias is not None:
                y_MN = y_MN + self.bias.to(dtype)
        return y_MN.unflatten(0, x.shape[:-1])


class Fp8Product(torch.autograd.Function):
    """y = x·wᵀ in the dtype of x; collects amaxes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_MK: Tensor, w_NK: Tensor, amax_3: Tensor, scale_3: Tensor, recipe: Recipe
    ) -> Tensor:
        product = PRODUCTS[recipe.implementation]
        if recipe.scaling == "block128":
            x, w = by_rows(x_MK, recipe.forward), by_tiles(w_NK, recipe.forward)
            kept = by_rows(x_MK.t(), recipe.forward)
            note(amax_3, 0, x_MK.abs().amax())
            note(amax_3, 1, w_NK.abs().amax())
        else:
            x = kept = cast(x_MK, 0, amax_3, scale_3, recipe)
            w = cast(w_NK, 1, amax_3, scale_3, recipe)
        ctx.save_for_backward(*kept, w_NK)
        # Not saved for backward like the others, which would forbid in-place changes before the backward pass.
        ctx.amax_3, ctx.scale_3 = amax_3, scale_3
        ctx.recipe, ctx.dtype = recipe, x_MK.dtype
        return product(x, w, x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx: FunctionCtx, g_MN: Tensor) -> tuple[Tensor | None, ...]:
        data, inverse, w_NK = ctx.saved_tensors
        kept, recipe, amax_3, scale_3 = Scaled(data, inverse), ctx.recipe, ctx.amax_3, ctx.scale_3
        product = PRODUCTS[recipe.implementation]
        if recipe.scaling == "block128":
            g, g_t = by_rows(g_MN, recipe.gradient), by_rows(g_MN.t(), recipe.gradient)
            w_t = by_tiles(w_NK, recipe.forward).transposed()
            x_t = kept
            note(amax_3, 2, g_MN.abs().amax())
        else:
            g = cast(g_MN, 2, amax_3, scale_3, recipe)
            g_t, x_t = g.transposed(), kept.transposed()
            w_t = cast(w_NK, 1, amax_3, scale_3, recipe, record=False).transposed()
        grad_x_MK = product(g, w_t, ctx.dtype, fast=False)
        grad_w_NK = product(g_t, x_t, w_NK.dtype, fast=False)
        return grad_x_MK, grad_w_NK, None, None, None


def cast(x_MK: Tensor, slot: int, amax_3: Tensor, scale_3: Tensor, recipe: Recipe, record: bool = True) -> Scaled:
    """Tensor-wise FP8 of any shape, with the scale of the step (delayed) or of the tensor itself (current)."""
    dtype = recipe.gradient if slot == 2 else recipe.forward
    amax = x_MK.abs().amax().float()
    if record:
        note(amax_3, slot, amax)
    scale = tensor_scale(amax, LARGEST[dtype], recipe.margin)
    if recipe.scaling == "delayed":
        known = scale_3[slot]
        # 0·amax: otherwise a delayed scale would silently clamp an Inf to a large number.
        scale = torch.where(known > 0, known + 0 * amax, scale)
    return by_tensor(x_MK, scale, dtype)


def note(amax_3: Tensor, slot: int, amax: Tensor) -> None:
    """Update the running maximum of a slot. NaN is kept; `state.py` handles it."""
    amax_3[slot].copy_(torch.maximum(amax_3[slot], amax.float()))
