"""Routed experts: y[s] = Σ_k weight[s, k] · down[e] · act(up[e] · x[s]), e = expert[s, k]. Dropless.

Legend: S tokens, D hidden, E experts, F expert width, G rows of the first product (F, or 2·F with a gate),
K experts chosen for each token, R = S·K routed copies, N choices in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops.activation import ACTIVATIONS


def count_choices(expert_N: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs; int64 [E]. torch.bincount does the same, but on a GPU the host waits for it."""
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    return count_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))


def experts_reference(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
) -> Tensor:
    """The definition, one expert after the other. Returns [S, D] in the dtype of x.

    Args:
        activation: of `trainer.ops.activation`; swiglu takes gate and up one below the other in `up_EGD`.
    """
    y_SD = torch.zeros_like(x_SD, dtype=torch.float32)
    for e in range(up_EGD.shape[0]):
        token, slot = torch.where(expert_SK == e)
        hidden = ACTIVATIONS[activation].value(F.linear(x_SD[token], up_EGD[e]))
        y_SD = y_SD.index_add(0, token, F.linear(hidden, down_EDF[e]).float() * weight_SK[token, slot, None])
    return y_SD.to(x_SD.dtype)


class Routing(NamedTuple):
    """The routed copies sorted by expert: which copy stands where, where each copy went, copies of each expert."""

    order_R: Tensor
    place_R: Tensor
    count_E: Tensor
    top_k: int


def by_expert(expert_SK: Tensor, num_experts: int) -> Routing:
    expert_R = expert_SK.flatten()
    order_R = expert_R.argsort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return Routing(order_R, place_R, count_choices(expert_R, num_experts), expert_SK.shape[1])


def dispatch(x_SD: Tensor, routing: Routing) -> Tensor:
    """Copies of each token in expert order, [R, D]."""
    return _Dispatch.apply(x_SD, routing.order_R, routing.place_R, routing.top_k)


def combine(y_RD: Tensor, routing: Routing) -> Tensor:
    """Sum of the copies of each token, in token order, [S, D]."""
    return _Combine.apply(y_RD, routing.order_R, routing.place_R, routing.top_k)


def in_token_order(y_RD: Tensor, routing: Routing) -> Tensor:
    """The copies themselves, those of each token side by side, [R, D]."""
    return _Dispatch.apply(y_RD, routing.place_R, routing.order_R, 1)


def compute_dtype(x_SD: Tensor) -> torch.dtype:
    """The dtype of matrix products on x: that of autocast where it is on."""
    device_type = x_SD.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x_SD.dtype


def copies(x_SD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """The routed copies of tokens in expert order, [R, D]."""
    return x_SD.index_select(0, order_R // top_k)


def sums(y_RD: Tensor, place_R: Tensor, top_k: int) -> Tensor:
    """Of the copies of each token, in token order, [S, D]."""
    return y_RD.index_select(0, place_R).view(-1, top_k, y_RD.shape[-1]).sum(1)


class _Dispatch(torch.autograd.Function):
    """Copies of each token in expert order. Its gradient gathers and sums where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_SD: Tensor, order_R: Tensor, place_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.top_k = top_k
        return copies(x_SD, order_R, top_k)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (place_R,) = ctx.saved_tensors
        return sums(grad_RD, place_R, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Sum of the copies of each token, in token order; the transpose of `_Dispatch`."""

    @staticmethod
    def forward(ctx: FunctionCtx, y_RD: Tensor, order_R: Tensor, place_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = top_k
        return sums(y_RD, place_R, top_k)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return copies(grad_SD, order_R, ctx.top_k), None, None, None
