"""Experts whose two passes are one operator each: what kernels that fuse all of it have in common.

Of the routed copies only b, the hidden layer before its activation, is kept from the forward to the backward pass.
torch.compile and CUDA graphs see two operators without a read of the host: how many copies an expert has stays on the
device.

Legend as in `trainer.ops.experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops.experts import compute_dtype, count_choices


class Operators(NamedTuple):
    """
    Attributes:
        forward: (x_SD, up_EGD, down_EDF, weight_SK, order_R, ends_E, activation, adds) → y_SD, before_RG.
        backward: (grad_SD, x_SD, up_EGD, down_EDF, weight_SK, order_R, ends_E, before_RG, of_up, of_down, adds) →
            gradients of x, up, down and the weights; empty ones for experts of which none is wanted, and with `adds`,
            as they then are added to sums that no compiler knows of (trainer/ops/narrow.py).
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def operators(name: str, forward: Callable[..., Any], backward: Callable[..., Any], *, adds: bool = False) -> Operators:
    """Make the operators yaongi::`name` and yaongi::`name`_backward of two functions.

    Args:
        forward: without the argument `adds`; backward: with it only where `adds` says that it can.
    """

    def run_without(*arguments: Any) -> Any:
        *others, wanted = arguments
        assert adds or not wanted, f"{name} adds no gradients"
        return backward(*arguments) if adds else backward(*others)

    run = torch.library.custom_op(
        f"yaongi::{name}", _without_autocast(lambda *given: forward(*given[:-1])), mutates_args=(), schema=FORWARD
    )
    run_backward = torch.library.custom_op(
        f"yaongi::{name}_backward", _without_autocast(run_without), mutates_args=(), schema=BACKWARD
    )
    run.register_fake(_fake_forward)
    run_backward.register_fake(_fake_backward)

    def differentiate(ctx: FunctionCtx, grad_SD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _x, of_up, of_down, *_rest = ctx.needs_input_grad
        grad_x_SD, up, down, grad_weight_SK = run_backward(grad_SD, *ctx.saved_tensors, of_up, of_down, ctx.adds)
        grad_up, grad_down = (g if of and not ctx.adds else None for g, of in ((up, of_up), (down, of_down)))
        return grad_x_SD, grad_up, grad_down, grad_weight_SK, None, None, None, None

    run.register_autograd(differentiate, setup_context=_save)
    return Operators(run, run_backward)


FORWARD = (
    "(Tensor x, Tensor up, Tensor down, Tensor weight, Tensor order, Tensor ends, str activation, bool adds) -> "
    "(Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor grad, Tensor x, Tensor up, Tensor down, Tensor weight, Tensor order, Tensor ends, Tensor before, "
    "bool of_up, bool of_down, bool adds) -> (Tensor, Tensor, Tensor, Tensor)"
)


def run(
    made: Operators,
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str,
    *,
    adds: bool = False,
) -> Tensor:
    """The experts' output in the dtype of x; see `trainer.ops.experts.experts_reference`."""
    expert_R = expert_SK.flatten()
    order_R, ends_E = expert_R.argsort(stable=True), count_choices(expert_R, up_EGD.shape[0]).cumsum(0).to(torch.int32)
    # Kernels read rows where they lie, and leave gradients in the same layout.
    given = (tensor.to(compute_dtype(x_SD)).contiguous() for tensor in (x_SD, up_EGD, down_EDF))
    y_SD, _ = made.forward(*given, weight_SK, order_R, ends_E, activation, adds)
    return y_SD.to(x_SD.dtype)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes are decided by then; autocast would take sums to fp32."""

    def called(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return called


def _fake_forward(
    x_SD: Tensor, up_EGD: Tensor, _down: Tensor, _weight: Tensor, order_R: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x_SD.new_empty(x_SD.shape), x_SD.new_empty(len(order_R), up_EGD.shape[1])


def _fake_backward(
    _grad: Tensor, x_SD: Tensor, up: Tensor, down: Tensor, weight_SK: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, of_up, of_down, adds = rest
    grad_up = torch.empty_like(up) if of_up and not adds else up.new_empty(0)
    grad_down = torch.empty_like(down) if of_down and not adds else down.new_empty(0)
    return x_SD.new_empty(x_SD.shape), grad_up, grad_down, torch.empty_like(weight_SK)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _activation, ctx.adds = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
