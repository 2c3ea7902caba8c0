"""The residual addition and the RMSNorm after it by a Triton kernel of our own (trainer/kernels/add_norm.py).

Both passes are operators, which torch.compile keeps whole. Legend as in `trainer.ops.add_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.experts import compute_dtype
from trainer.ops.setting import Setting

MODULE = "triton"
WIDEST = 16384  # a token is one block of a program; wider ones would not fit its registers


def add_norm_triton(x_D: Tensor, y_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_norm_reference`."""
    sum_D, out_D, _ = _add_norm(x_D, y_D, weight_D, eps, compute_dtype(x_D))
    return x_D if y_D is None else sum_D, out_D


def unsupported(setting: Setting) -> str | None:
    """None where the kernel runs: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
    if (reason := setting.own_kernels()) is not None:
        return reason
    if setting.model is not None and setting.model.hidden > WIDEST:
        return f"takes a hidden size up to {WIDEST}, the model has {setting.model.hidden}"
    return packages.problem(packages.load(MODULE))


@torch.library.custom_op("yaongi::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without y, as an operator may not return what it was given), its norm, and the norm's factor."""
    from trainer.kernels import add_norm

    found = _results(x, y, dtype)
    add_norm.forward(x.contiguous(), None if y is None else y.contiguous(), weight.contiguous(), eps, *found)
    return found


@torch.library.custom_op("yaongi::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Of either summand and of the weight; `total` is what the norm is of."""
    from trainer.kernels import add_norm

    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    return add_norm.backward(grad_out.contiguous(), grad_sum, total.contiguous(), weight.contiguous(), scale)


def _results(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if y is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_norm.register_fake
def _(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, y, dtype)


@_add_norm_backward.register_fake
def _(grad_out: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), torch.empty_like(weight)


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight, _, _ = inputs
    total, _, scale = output
    ctx.dtypes = x.dtype, None if y is None else y.dtype
    ctx.save_for_backward(x if y is None else total, weight, scale)


def _backward(ctx: FunctionCtx, grad_sum: Tensor, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_y = ctx.dtypes
    grad, grad_weight = _add_norm_backward(grad_out, None if of_y is None else grad_sum, *ctx.saved_tensors)
    return grad.to(of_x), None if of_y is None else grad.to(of_y), grad_weight, None, None


_add_norm.register_autograd(_backward, setup_context=_save)
