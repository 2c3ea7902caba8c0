"""Grouped FP8 products for the experts: rows sorted by expert, one weight matrix per expert.

    emulated   all recipes, all three products: torch's grouped product of BF16 numbers, each of which is an FP8 number
               or, with blocks, one times a power of two; so only its sums are rounded, once, to BF16
    torch      torch's grouped scaled GEMM (compute capability 9.0), E4M3 only: forward and gradient of the input in
               FP8, gradient of the weights in BF16, as the operands of that one would have to be padded for each
               expert. The operation takes a scale for each row; tensor-wise recipes fill them with one number.

With tensor-wise recipes all experts share one scale for each operand, so the state does not depend on which rank holds
which expert. 128-blocks along the tokens (gradient of the weights) never span two experts.

Legend: R routed copies of tokens, sorted by expert, K inputs, N outputs, E experts, B blocks of 128 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.fp8.linear import Recipe, Slots, cast, note
from trainer.fp8.scaling import BLOCK, E4M3, Scaled, block_scale, by_rows, by_tiles, dequantised, to_fp8
from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import by_expert, combine, compute_dtype, dispatch
from trainer.ops.experts_grouped import experts_grouped


def experts_fp8(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
    *,
    up: Fp8Grouped,
    down: Fp8Grouped,
) -> Tensor:
    """`experts_grouped` with FP8 for both grouped products; itself in evaluation mode."""
    if not up.owner.training:
        return experts_grouped(x_SD, up_EGD, down_EDF, expert_SK, weight_SK, activation)
    routing, dtype = by_expert(expert_SK, up_EGD.shape[0]), compute_dtype(x_SD)
    ends_E = routing.count_E.cumsum(0).to(torch.int32)
    hidden_RF = ACTIVATIONS[activation].value(up(dispatch(x_SD.to(dtype), routing), up_EGD, ends_E))
    hidden_RF = hidden_RF * weight_SK.flatten().index_select(0, routing.order_R)[:, None].to(dtype)
    return combine(down(hidden_RF, down_EDF, ends_E), routing).to(x_SD.dtype)


class Fp8GroupedProduct(torch.autograd.Function):
    """y[r] = x[r] · w[e]ᵀ for the rows r of expert e; `ends_E` (int32) are the ends of the experts' rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_RK: Tensor,
        w_ENK: Tensor,
        ends_E: Tensor,
        amax_3: Tensor,
        scale_3: Tensor,
        recipe: Recipe,
    ) -> Tensor:
        ctx.recipe, ctx.amax_3, ctx.scale_3 = recipe, amax_3, scale_3
        ctx.save_for_backward(x_RK, w_ENK, ends_E)
        x = _rows(x_RK, 0, amax_3, scale_3, recipe)
        w = _weights(w_ENK, amax_3, scale_3, recipe)
        return _PRODUCTS[recipe.implementation](x, w, w_ENK.shape, ends_E, x_RK.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, g_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, w_ENK, ends_E = ctx.saved_tensors
        recipe, amax_3, scale_3 = ctx.recipe, ctx.amax_3, ctx.scale_3
        g = _rows(g_RN, 2, amax_3, scale_3, recipe)
        w = _weights(w_ENK, amax_3, scale_3, recipe, record=False)
        grad_x_RK = _PRODUCTS[recipe.implementation](g, w, w_ENK.shape, ends_E, x_RK.dtype, transposed=True)
        if recipe.implementation == "torch":
            grad_w_ENK = F.grouped_mm(g_RN.t().to(torch.bfloat16), x_RK.to(torch.bfloat16), offs=ends_E)
        elif recipe.scaling == "block128":
            g_bf16_RN = along_tokens(g_RN, ends_E, recipe.gradient)
            grad_w_ENK = F.grouped_mm(g_bf16_RN.t(), along_tokens(x_RK, ends_E, recipe.forward), offs=ends_E)
        else:
            x = _rows(x_RK, 0, amax_3, scale_3, recipe, record=False)
            grad_w_ENK = F.grouped_mm(g.data_MK.bfloat16().t(), x.data_MK.bfloat16(), offs=ends_E).float()
            grad_w_ENK *= g.inverse * x.inverse
        return grad_x_RK, grad_w_ENK.to(w_ENK.dtype), None, None, None, None


class Fp8Grouped:
    """A grouped product of FP8 numbers, of an `owner` in training mode."""

    def __init__(self, recipe: Recipe, slots: Slots, owner: torch.nn.Module) -> None:
        self.recipe, self.slots, self.owner = recipe, slots, owner

    def __call__(self, x_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
        with torch.autocast(x_RK.device.type, enabled=False):
            return Fp8GroupedProduct.apply(x_RK, w_ENK, ends_E, self.slots.amax, self.slots.scale, self.recipe)


def along_tokens(x_RK: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast in blocks of 128 rows of one expert and one column, and back, to BF16, which holds the result exactly."""
    rows = torch.arange(x_RK.shape[0], device=x_RK.device)
    expert_R = torch.searchsorted(ends_E, rows, right=True)
    start_E = F.pad(ends_E[:-1], (1, 0))
    blocks_E = (ends_E - start_E + BLOCK - 1) // BLOCK
    first_E = F.pad(blocks_E.cumsum(0)[:-1], (1, 0))
    block_R = first_E[expert_R] + (rows - start_E[expert_R]) // BLOCK
    most = x_RK.shape[0] // BLOCK + ends_E.shape[0]
    amax_BK = torch.zeros(most, x_RK.shape[1], device=x_RK.device)
    amax_BK = amax_BK.scatter_reduce(0, block_R[:, None].expand_as(x_RK), x_RK.abs().float(), "amax")
    scale_RK = block_scale(amax_BK, dtype)[block_R]
    return (to_fp8(x_RK, scale_RK, dtype).float() / scale_RK).bfloat16()


def _rows(x_RK: Tensor, slot: int, amax_3: Tensor, scale_3: Tensor, recipe: Recipe, record: bool = True) -> Scaled:
    if recipe.scaling != "block128":
        return cast(x_RK, slot, amax_3, scale_3, recipe, record)
    if record:
        note(amax_3, slot, x_RK.abs().amax())
    return by_rows(x_RK, recipe.gradient if slot == 2 else recipe.forward)


def _weights(w_ENK: Tensor, amax_3: Tensor, scale_3: Tensor, recipe: Recipe, record: bool = True) -> Scaled:
    """Of all experts, one below the other [E·N, K]: tiles never span two experts, as N is a multiple of 128 then."""
    w_MK = w_ENK.flatten(0, 1)
    if recipe.scaling != "block128":
        return cast(w_MK, 1, amax_3, scale_3, recipe, record)
    if record:
        note(amax_3, 1, w_MK.abs().amax())
    return by_tiles(w_MK, recipe.forward)


def _emulated(
    x: Scaled, w: Scaled, shape: torch.Size, ends_E: Tensor, dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    blocks = x.inverse.dim() > 0
    w_ENK = (dequantised(w) if blocks else w.data_MK).bfloat16().view(shape)
    x_RK = (dequantised(x) if blocks else x.data_MK).bfloat16()
    y_RN = F.grouped_mm(x_RK, w_ENK if transposed else w_ENK.transpose(1, 2), offs=ends_E)
    return y_RN.to(dtype) if blocks else (y_RN.float() * (x.inverse * w.inverse)).to(dtype)


def _torch(
    x: Scaled, w: Scaled, shape: torch.Size, ends_E: Tensor, dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    w_ENK = w.data_MK.view(shape)
    if transposed:
        w_ENK = w_ENK.transpose(1, 2).contiguous()
    y_RN = torch._scaled_grouped_mm(
        x.data_MK,
        w_ENK.transpose(1, 2),
        x.inverse.expand(x.data_MK.shape[0]).contiguous(),
        w.inverse.expand(w_ENK.shape[:2]).contiguous(),
        offs=ends_E,
        out_dtype=torch.bfloat16,
        use_fast_accum=not transposed,
    )
    return y_RN.to(dtype)


_PRODUCTS = {"emulated": _emulated, "torch": _torch}


def experts_problem(recipe: Recipe, backend: str, capability: tuple[int, int] | None) -> str | None:
    """Why the experts are not FP8 with this implementation and this `backends.experts`; None if they are."""
    if recipe.implementation == "te":
        return "FP8 here is that of the experts backend te"
    if backend != "grouped":
        return f"FP8 experts take the place of the backend grouped, not of {backend}"
    if recipe.implementation == "emulated":
        return None
    if recipe.scaling == "block128":
        return "torch's grouped FP8 product knows no blocks of 128"
    if recipe.gradient is not E4M3:
        return "torch's grouped FP8 product takes no E5M2; train.precision.fp8.format e4m3 would do"
    if capability is not None and capability[0] != 9:
        return "torch's grouped FP8 product needs compute capability 9.0"
    return None
