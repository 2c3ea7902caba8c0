"""Routed experts as one operation: copies sorted by expert, a matrix product for each expert, and sums of the copies.

Forward and backward are hand-written, so that little is kept: of the routed copies, only the hidden layer before its
activation. Copies, activations and casts of the weights are recomputed in the backward pass. The routing weights
multiply the hidden layer instead of the output: it is narrower, and the copies of a token are then only summed.

These are torch's grouped products, for GPUs; on a CPU the work is done expert by expert (trainer/ops/experts_cpu.py).

Legend as in `trainer.ops.experts`; O outputs and I inputs of a projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops import experts_cpu
from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import by_expert, compute_dtype, copies, sums
from trainer.ops.setting import Setting


def experts_grouped(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
) -> Tensor:
    """See `experts_reference`."""
    routing = by_expert(expert_SK, up_EGD.shape[0])
    ends_E = routing.count_E.cumsum(0).to(torch.int32)
    tokens_SD = x_SD.to(compute_dtype(x_SD))
    if x_SD.device.type == "cpu":
        y_SD, _ = experts_cpu.experts(tokens_SD, up_EGD, down_EDF, weight_SK, routing.order_R, ends_E, activation)
    else:
        order_R, place_R = routing.order_R, routing.place_R
        y_SD = _Experts.apply(tokens_SD, up_EGD, down_EDF, weight_SK, order_R, place_R, ends_E, activation)
    return y_SD.to(x_SD.dtype)


class _Experts(torch.autograd.Function):
    """Everything is computed in the dtype of x; gradients leave in the dtypes of what they belong to."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_SD: Tensor,
        up_EGD: Tensor,
        down_EDF: Tensor,
        weight_SK: Tensor,
        order_R: Tensor,
        place_R: Tensor,
        ends_E: Tensor,
        activation: str,
    ) -> Tensor:
        top_k, dtype = weight_SK.shape[1], x_SD.dtype
        with torch.autocast(x_SD.device.type, enabled=False):
            before_RG = _by_expert(copies(x_SD, order_R, top_k), up_EGD, ends_E)
            hidden_RF = ACTIVATIONS[activation].weighted(before_RG, _in_order(weight_SK, order_R, dtype))
            y_RD = _by_expert(hidden_RF, down_EDF, ends_E)
        ctx.activation = activation
        ctx.save_for_backward(x_SD, up_EGD, down_EDF, weight_SK, order_R, place_R, ends_E, before_RG)
        return sums(y_RD, place_R, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, up_EGD, down_EDF, weight_SK, order_R, place_R, ends_E, before_RG = ctx.saved_tensors
        top_k, dtype = weight_SK.shape[1], x_SD.dtype
        with torch.autocast(x_SD.device.type, enabled=False):
            grad_RD = copies(grad_SD.to(dtype), order_R, top_k)
            weight_R1 = _in_order(weight_SK, order_R, dtype)
            activation = ACTIVATIONS[ctx.activation]
            grad_up_EGD = grad_down_EDF = None  # if the experts are frozen
            if ctx.needs_input_grad[2]:
                outer_EDF = _outer(grad_RD, activation.weighted(before_RG, weight_R1), ends_E)
                grad_down_EDF = outer_EDF.to(down_EDF.dtype)
            grad_hidden_RF = _by_expert(grad_RD, down_EDF, ends_E, transposed=True)
            grad_before_RG, grad_weight_R = activation.gradients(before_RG, grad_hidden_RF, weight_R1)
            grad_x_RD = _by_expert(grad_before_RG, up_EGD, ends_E, transposed=True)
            if ctx.needs_input_grad[1]:
                grad_up_EGD = _outer(grad_before_RG, copies(x_SD, order_R, top_k), ends_E).to(up_EGD.dtype)
        return (
            sums(grad_x_RD, place_R, top_k),
            grad_up_EGD,
            grad_down_EDF,
            grad_weight_R.index_select(0, place_R).view_as(weight_SK).to(weight_SK.dtype),
            None,
            None,
            None,
            None,
        )


def _by_expert(a_RI: Tensor, w_EOI: Tensor, ends_E: Tensor, *, transposed: bool = False) -> Tensor:
    """a · wᵀ with the matrix of each row's expert, [R, O]; with `transposed` a [R, O] is multiplied by w itself."""
    w_EOI = w_EOI.to(a_RI.dtype)
    return F.grouped_mm(a_RI, w_EOI if transposed else w_EOI.transpose(1, 2), offs=ends_E)


def _outer(a_RO: Tensor, b_RI: Tensor, ends_E: Tensor) -> Tensor:
    """aᵀ · b over the rows of each expert, [E, O, I]."""
    return F.grouped_mm(a_RO.transpose(0, 1), b_RI, offs=ends_E)


def _in_order(weight_SK: Tensor, order_R: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1] weights of the copies in expert order."""
    return weight_SK.flatten().index_select(0, order_R)[:, None].to(dtype)


def unsupported(setting: Setting) -> str | None:
    """None where torch has a grouped matrix product for these widths, else the reason."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    model, row_bytes = setting.model, setting.dtype.itemsize
    if model and model.moe and any(n * row_bytes % 16 for n in (model.hidden, model.moe.expert_width)):
        widths = f"{model.hidden} and {model.moe.expert_width} wide"
        return f"rows must be multiples of 16 bytes, the model is {widths}"
    return setting.below(8, 0) if setting.device.type == "cuda" else None
