"""Routed experts on a CPU: one expert after the other, from its tokens to its share of the sum, all of it in the cache.

Wide tensors are never materialised: routed copies and their outputs exist for only one expert at a time. If the CPU has
no BF16 instructions, BF16 numbers are multiplied as FP32, which gives the same products and sums several times faster.
Both passes are custom operators, so that torch.compile does not trace the loops.  Legend as in `trainer.ops.experts`; r
the copies of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops.activation import ACTIVATIONS
from trainer.ops.wide import computed_in


@torch.library.custom_op("yaongi::experts", mutates_args=())
def experts(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    weight_SK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y [S, D] in the dtype of x, and the hidden layer before its activation, [R, G], for the backward pass.

    Args:
        order_R: the copies (token · K + slot) sorted by expert; ends_E: where each expert's copies end.
    """
    wide = computed_in(x_SD.dtype, x_SD.device)
    y_SD = torch.zeros_like(x_SD, dtype=torch.float32)
    before_RG = x_SD.new_empty(order_R.numel(), up_EGD.shape[1])
    for e, rows, copies_r, token_r in _by_expert(order_R, ends_E, weight_SK.shape[1]):
        _product(x_SD[token_r].to(wide), up_EGD[e].to(x_SD.dtype).to(wide).T, before_RG[rows])
        weight_r1 = weight_SK.flatten()[copies_r][:, None].to(x_SD.dtype)
        hidden_rF = ACTIVATIONS[activation].weighted(before_RG[rows], weight_r1).to(wide)
        y_SD.index_add_(0, token_r, (hidden_rF @ down_EDF[e].to(x_SD.dtype).to(wide).T).float())
    return y_SD.to(x_SD.dtype), before_RG


@experts.register_fake
def _(
    x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, weight_SK: Tensor, order_R: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_SD), x_SD.new_empty(order_R.numel(), up_EGD.shape[1])


@torch.library.custom_op("yaongi::experts_backward", mutates_args=())
def _gradients(
    grad_SD: Tensor,
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    weight_SK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    before_RG: Tensor,
    activation: str,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, down and weight, in their dtypes; empty where not needed."""
    wide = computed_in(x_SD.dtype, x_SD.device)
    act = ACTIVATIONS[activation]
    grad_x_SD = torch.zeros_like(x_SD, dtype=torch.float32)
    grad_up_EGD, grad_down_EDF = _empty(up_EGD, needs_up), _empty(down_EDF, needs_down)
    grad_weight_R = torch.empty(weight_SK.numel(), dtype=weight_SK.dtype)
    for e, rows, copies_r, token_r in _by_expert(order_R, ends_E, weight_SK.shape[1]):
        weight_r1, before_rG = weight_SK.flatten()[copies_r][:, None], before_RG[rows]
        grad_rD = grad_SD[token_r].to(wide)
        if needs_down:
            hidden_rF = act.weighted(before_rG, weight_r1.to(before_rG.dtype)).to(wide)
            _product(grad_rD.T, hidden_rF, grad_down_EDF[e])
        grad_hidden_rF = grad_rD @ down_EDF[e].to(x_SD.dtype).to(wide)
        grad_before_rG, grad_weight_r = act.gradients(before_rG.to(wide), grad_hidden_rF, weight_r1.to(wide))
        grad_weight_R[copies_r] = grad_weight_r.to(weight_SK.dtype)
        if needs_up:
            _product(grad_before_rG.T, x_SD[token_r].to(wide), grad_up_EGD[e])
        grad_x_SD.index_add_(0, token_r, (grad_before_rG @ up_EGD[e].to(x_SD.dtype).to(wide)).float())
    return grad_x_SD.to(x_SD.dtype), grad_up_EGD, grad_down_EDF, grad_weight_R.view_as(weight_SK)


@_gradients.register_fake
def _(
    grad_SD: Tensor, x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, weight_SK: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_up, needs_down = more
    weights = _empty(up_EGD, needs_up), _empty(down_EDF, needs_down)
    return torch.empty_like(x_SD), *weights, torch.empty_like(weight_SK)


def _keep(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(
        False
    )  # the hidden layer needs no gradient, for which zeros of its size would be allocated


def _backward(ctx: FunctionCtx, grad_SD: Tensor, _grad_before_RG: Tensor | None) -> tuple[Tensor | None, ...]:
    x_SD, up_EGD, down_EDF, weight_SK, order_R, ends_E, before_RG = ctx.saved_tensors
    given = (x_SD, up_EGD, down_EDF, weight_SK, order_R, ends_E, before_RG)
    _, needs_up, needs_down, *_ = ctx.needs_input_grad
    grad_x, *weights, grad_weight = _gradients(grad_SD.contiguous(), *given, ctx.activation, needs_up, needs_down)
    grad_up, grad_down = (g if needed else None for g, needed in zip(weights, (needs_up, needs_down), strict=True))
    return grad_x, grad_up, grad_down, grad_weight, None, None, None


experts.register_autograd(_backward, setup_context=_keep)


def _by_expert(order_R: Tensor, ends_E: Tensor, top_k: int) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Number, place among the sorted copies, copies and tokens of each expert; one without tokens has none."""
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        copies_r = order_R[start:end]
        yield e, slice(start, end), copies_r, copies_r // top_k
        start = end


def _empty(like: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(like) if needed else like.new_empty(0)


def _product(left: Tensor, right: Tensor, result: Tensor) -> None:
    """result ← left @ right, without a copy where the dtypes agree."""
    if result.dtype == left.dtype:
        torch.mm(left, right, out=result)
    else:
        result.copy_(left @ right)
