"""Routed experts by Triton kernels of our own (trainer/kernels/grouped.py).

Tokens are never copied, activations never stored, and outputs are written in token order: sorted copies, their
activations and gathered outputs cost grouped products more traffic than the weights do.

Legend as in `trainer.ops.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.ops import experts_fused, packages
from trainer.ops.narrow import sum_of
from trainer.ops.setting import Setting

KERNELS = "trainer.kernels.grouped"


def experts_triton(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
    *,
    adds: bool = False,
) -> Tensor:
    """See `trainer.ops.experts.experts_reference`.

    Args:
        adds: the weights are copies that take gradients (trainer/ops/narrow.py): add to their sums in the products.
    """
    return experts_fused.run(OPERATORS, x_SD, up_EGD, down_EDF, expert_SK, weight_SK, activation, adds=adds)


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
    if (reason := setting.own_kernels()) is not None:
        return reason
    return packages.problem(packages.load("triton")) or packages.problem(packages.load(KERNELS))


def _forward(
    x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, weight_SK: Tensor, order_R: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    kernels: Any = packages.load(KERNELS)
    rows, top_k = len(order_R), weight_SK.shape[1]
    tiles, weight_R = kernels.Tiles(ends_E, rows), weight_SK.flatten()[order_R]
    before_RG = kernels.products(x_SD.contiguous(), up_EGD, tiles, rows, source_R=order_R // top_k)
    gated = activation == "swiglu"
    y_RD = kernels.products(before_RG, down_EDF, tiles, rows, target_R=order_R, weight_R=weight_R, gated=gated)
    return y_RD.view(-1, top_k, y_RD.shape[1]).sum(1), before_RG


def _backward(
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
    adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels: Any = packages.load(KERNELS)
    rows, top_k, grad_SD = len(order_R), weight_SK.shape[1], grad_SD.contiguous()
    tiles, token_R, weight_R = kernels.Tiles(ends_E, rows), order_R // top_k, weight_SK.flatten()[order_R]
    before, grad_weight_R = kernels.backward_products(grad_SD, down_EDF, before_RG, tiles, token_R, weight_R)
    grad_x_RD = kernels.products(before, up_EGD.transpose(1, 2), tiles, rows, target_R=order_R)
    grad_up_EGD, grad_down_EDF = up_EGD.new_empty(0), down_EDF.new_empty(0)
    if of_down:
        out, add = sum_of(down_EDF) if adds else (torch.empty_like(down_EDF), False)
        kernels.outer(grad_SD, before_RG, ends_E, out, source_a_R=token_R, weight_R=weight_R, add=add)
        grad_down_EDF = grad_down_EDF if adds else out
    if of_up:
        out, add = sum_of(up_EGD) if adds else (torch.empty_like(up_EGD), False)
        kernels.outer(before, x_SD.contiguous(), ends_E, out, source_b_R=token_R, add=add)
        grad_up_EGD = grad_up_EGD if adds else out
    grad_weight_SK = torch.empty_like(weight_SK)
    grad_weight_SK.view(-1)[order_R] = grad_weight_R.to(weight_SK.dtype)
    return grad_x_RD.view(-1, top_k, grad_x_RD.shape[1]).sum(1), grad_up_EGD, grad_down_EDF, grad_weight_SK


OPERATORS = experts_fused.operators("experts_triton", _forward, _backward, adds=True)
