"""Routed experts by the products of quack-kernels: CuTe DSL, for compute capability 9.0 and newer.

Tokens are gathered inside the products, squared ReLU and its derivative are computed in their epilogues, where the
gradient of the routing weights is summed as well. Outputs are weighted when they are summed, so that the hidden layer
is read as it was written. Other activations are computed by `experts_grouped`: quack has a gate's two halves
interleaved, and an approximation of its sigmoid.

Legend as in `trainer.ops.experts`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops import experts_fused, packages
from trainer.ops.experts import sums
from trainer.ops.experts_grouped import experts_grouped
from trainer.ops.setting import Setting

MODULE = "quack.gemm_interface"
PRODUCT, ACTIVATED, DERIVED = f"{MODULE}:gemm", f"{MODULE}:gemm_act", f"{MODULE}:gemm_dact"
SIDE = 8  # widths are multiples of it: rows of 16 bytes


def experts_quack(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
) -> Tensor:
    """See `trainer.ops.experts.experts_reference`."""
    run = experts_grouped if activation != "relu2" else _squared_relu
    return run(x_SD, up_EGD, down_EDF, expert_SK, weight_SK, activation)


def unsupported(setting: Setting) -> str | None:
    if (reason := setting.below(9, 0)) is not None:
        return reason
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bf16 and fp16, not {setting.variant}"
    moe = setting.model.moe if setting.model else None
    if setting.model and moe:
        if moe.activation != "relu2":
            return f"fuses squared ReLU, the model has {moe.activation}"
        if any(side % SIDE for side in (setting.model.hidden, moe.expert_width)):
            return f"sides are multiples of {SIDE}, the model is {setting.model.hidden} and {moe.expert_width} wide"
    problems = (packages.kernel_problem(path) for path in (PRODUCT, ACTIVATED, DERIVED))
    return next((problem for problem in problems if problem), None)


def _squared_relu(
    x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, expert_SK: Tensor, weight_SK: Tensor, activation: str
) -> Tensor:
    return experts_fused.run(OPERATORS, x_SD, up_EGD, down_EDF, expert_SK, weight_SK, activation)


def _forward(
    x_SD: Tensor, up_EGD: Tensor, down_EDF: Tensor, weight_SK: Tensor, order_R: Tensor, ends_E: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    product, activated = packages.kernel(PRODUCT).function, packages.kernel(ACTIVATED).function
    top_k, bounds = weight_SK.shape[1], _bounds(ends_E)
    token_R = (order_R // top_k).to(torch.int32)
    before_RF, hidden_RF = activated(
        x_SD.contiguous(), up_EGD.transpose(1, 2), activation="relu_sq", cu_seqlens_m=bounds, A_idx=token_R
    )
    y_RD = product(hidden_RF, down_EDF.transpose(1, 2), cu_seqlens_m=bounds)
    y_SKD = y_RD.index_select(0, _places(order_R)).view(-1, top_k, y_RD.shape[1])
    return torch.bmm(weight_SK[:, None].to(y_SKD.dtype), y_SKD)[:, 0], before_RF


def _backward(
    grad_SD: Tensor,
    x_SD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    weight_SK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    before_RF: Tensor,
    of_up: bool,
    of_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    product, derived = packages.kernel(PRODUCT).function, packages.kernel(DERIVED).function
    top_k, bounds, grad_SD = weight_SK.shape[1], _bounds(ends_E), grad_SD.contiguous()
    token_R, place_R = (order_R // top_k).to(torch.int32), _places(order_R)
    # weight · derivative · product; weight · h; and Σ h · product of each row, which is the gradient of its weight
    grad_before_RF, hidden_RF, grad_weight_R = derived(
        grad_SD,
        down_EDF,
        before_RF,
        activation="relu_sq",
        colvec_scale=weight_SK.flatten()[order_R].float(),
        colvec_reduce=True,
        cu_seqlens_m=bounds,
        A_idx=token_R,
    )
    grad_x_RD = product(grad_before_RF, up_EFD, cu_seqlens_m=bounds)
    grad_up_EFD, grad_down_EDF = up_EFD.new_empty(0), down_EDF.new_empty(0)
    if of_down:
        grad_down_EDF = torch.empty_like(down_EDF)
        product(grad_SD.T, hidden_RF, out=grad_down_EDF, cu_seqlens_k=bounds, A_idx=token_R)
    if of_up:  # only the first operand can be gathered, so this is the transpose
        grad_up_EFD = torch.empty_like(up_EFD)
        out_EDF = grad_up_EFD.transpose(1, 2)
        product(x_SD.contiguous().T, grad_before_RF, out=out_EDF, cu_seqlens_k=bounds, A_idx=token_R)
    grad_weight_SK = grad_weight_R.index_select(0, place_R).view_as(weight_SK).to(weight_SK.dtype)
    return sums(grad_x_RD, place_R, top_k), grad_up_EFD, grad_down_EDF, grad_weight_SK


def _bounds(ends_E: Tensor) -> Tensor:
    """[E + 1] int32: 0, then where the rows of each expert end."""
    return F.pad(ends_E, (1, 0))


def _places(order_R: Tensor) -> Tensor:
    """Where each copy went."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R


OPERATORS = experts_fused.operators("experts_quack", _forward, _backward)
