"""Routed experts by Triton kernels of our own (trainer/kernels/grouped.py).

As `experts_grouped`, of the copies of tokens only the hidden layer before its activation is kept, and its activation is
recomputed. Unlike there, tokens are never copied, activations never stored, and outputs are written in token order.
Both passes are operators, so that torch.compile keeps them whole.

Legend as in `trainer.ops.experts`; X tiles of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.experts import by_expert, compute_dtype
from trainer.ops.setting import Setting, interpreted

KERNELS = "trainer.kernels.grouped"


def experts_triton(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
) -> Tensor:
    """See `trainer.ops.experts.experts_reference`."""
    routing = by_expert(expert_SK, up_EGD.shape[0])
    ends_E = routing.count_E.cumsum(0).to(torch.int32)
    tokens_SD, up_EGD, down_EDF = (tensor.to(compute_dtype(x_SD)) for tensor in (x_SD, up_EGD, down_EDF))
    y_SD, _ = _experts(tokens_SD, up_EGD, down_EDF, weight_SK, routing.order_R, ends_E, activation)
    return y_SD.to(x_SD.dtype)


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
    if interpreted(setting.device):
        if setting.dtype is not torch.float32:
            return "Triton's interpreter computes fp32 only"
    elif (reason := setting.below(8, 0)) is not None:
        return reason
    return packages.problem(packages.load("triton")) or packages.problem(packages.load(KERNELS))


@torch.library.custom_op("yaongi::experts_triton", mutates_args=())
def _experts(
    x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, weight_SK: Tensor, order_R: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The sums of the copies, and b of each copy."""
    kernels: Any = packages.load(KERNELS)
    rows, top_k = len(order_R), weight_SK.shape[1]
    with torch.autocast(x_SD.device.type, enabled=False):
        tiles, weight_R = kernels.Tiles(ends_E, rows), weight_SK.flatten()[order_R]
        before_RG = kernels.products(x_SD.contiguous(), up_EGD, tiles, rows, source_R=order_R // top_k)
        y_RD = kernels.products(
            before_RG, down_EDF, tiles, rows, target_R=order_R, weight_R=weight_R, gated=activation == "swiglu"
        )
        return y_RD.view(-1, top_k, y_RD.shape[1]).sum(1), before_RG


@torch.library.custom_op("yaongi::experts_triton_backward", mutates_args=())
def _experts_backward(
    grad_SD: Tensor,
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    weight_SK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    before_RG: Tensor,
    of_up: bool,
    of_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, down and the weights; empty ones of frozen experts."""
    kernels: Any = packages.load(KERNELS)
    rows, top_k = len(order_R), weight_SK.shape[1]
    grad_up_EGD, grad_down_EDF = up_EGD.new_empty(0), down_EDF.new_empty(0)
    with torch.autocast(x_SD.device.type, enabled=False):
        tiles, token_R, weight_R = kernels.Tiles(ends_E, rows), order_R // top_k, weight_SK.flatten()[order_R]
        grad_SD = grad_SD.contiguous()
        grad_before_RG, grad_weight_R = kernels.backward_products(
            grad_SD, down_EDF, before_RG, tiles, token_R, weight_R
        )
        grad_x_RD = kernels.products(grad_before_RG, up_EGD.transpose(1, 2), tiles, rows, target_R=order_R)
        if of_down:
            like = torch.empty_like(down_EDF)
            grad_down_EDF = kernels.outer(grad_SD, before_RG, ends_E, like, source_a_R=token_R, weight_R=weight_R)
        if of_up:
            like = torch.empty_like(up_EGD)
            grad_up_EGD = kernels.outer(grad_before_RG, x_SD.contiguous(), ends_E, like, source_b_R=token_R)
        grad_weight_SK = torch.empty_like(weight_SK)
        grad_weight_SK.view(-1)[order_R] = grad_weight_R.to(weight_SK.dtype)
        return grad_x_RD.view(-1, top_k, grad_x_RD.shape[1]).sum(1), grad_up_EGD, grad_down_EDF, grad_weight_SK


@_experts.register_fake
def _(x_SD: Tensor, up_EGD: Tensor, _down: Tensor, _weight: Tensor, order_R: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_SD.new_empty(x_SD.shape), x_SD.new_empty(len(order_R), up_EGD.shape[1])


@_experts_backward.register_fake
def _(
    _grad: Tensor, x_SD: Tensor, up: Tensor, down: Tensor, weight_SK: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, of_up, of_down = rest
    grad_up = torch.empty_like(up) if of_up else up.new_empty(0)
    grad_down = torch.empty_like(down) if of_down else down.new_empty(0)
    return x_SD.new_empty(x_SD.shape), grad_up, grad_down, torch.empty_like(weight_SK)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: FunctionCtx, grad_SD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _x, of_up, of_down, *_rest = ctx.needs_input_grad
    grad_x_SD, grad_up, grad_down, grad_weight_SK = _experts_backward(grad_SD, *ctx.saved_tensors, of_up, of_down)
    return grad_x_SD, grad_up if of_up else None, grad_down if of_down else None, grad_weight_SK, None, None, None


_experts.register_autograd(_backward, setup_context=_save)
