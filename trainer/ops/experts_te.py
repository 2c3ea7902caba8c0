"""Routed experts by Transformer Engine's GroupedLinear: one GEMM for each expert, on several streams.

The module only makes the call. Our module owns the weights as one stacked parameter, so TE's own weights are replaced
by slices of the stack; autograd then gives the stack one gradient. The token counts are copied to the host once per
call. Under `te.autocast` the products are FP8, with each expert's rows padded as the recipe wants; not under delayed
scaling, whose history of maxima belongs to one layer while a carrier serves all of one shape.

Legend as in `trainer.ops.experts`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.ops import packages
from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import by_expert, combine, compute_dtype, dispatch
from trainer.ops.setting import Setting

MODULE, STATE = "transformer_engine.pytorch", "transformer_engine.pytorch.quantization"


def experts_te(
    x_SD: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str = "relu2",
) -> Tensor:
    """See `experts_reference`."""
    te: Any = packages.load(MODULE)
    routing, dtype = by_expert(expert_SK, up_EGD.shape[0]), compute_dtype(x_SD)
    counts = rows = routing.count_E.tolist()
    x_RD = dispatch(x_SD.to(dtype), routing)
    if in_fp8 := _stateless_fp8():
        x_RD, rows = te.Fp8Padding(len(counts))(x_RD, counts)
    with torch.autocast(x_SD.device.type, enabled=False), te.autocast(enabled=in_fp8, recipe=_recipe()):
        hidden_RF = ACTIVATIONS[activation].value(_product(x_RD, up_EGD.to(dtype), rows))
        y_RD = _product(hidden_RF, down_EDF.to(dtype), rows)
    if in_fp8:
        y_RD = te.Fp8Unpadding(len(counts))(y_RD, counts)
    y_RD = y_RD * weight_SK.flatten().index_select(0, routing.order_R)[:, None].to(dtype)
    return combine(y_RD, routing).to(x_SD.dtype)


def unsupported(setting: Setting) -> str | None:
    """None where Transformer Engine can be imported on a GPU of compute capability 8.0, else the reason."""
    if (reason := setting.below(8, 0)) is not None:
        return reason
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bf16 and fp16, not {setting.variant}"
    return packages.problem(packages.load(MODULE))


def _recipe() -> Any:
    """The recipe of the surrounding `te.autocast`; None where FP8 is off."""
    module: Any = packages.load(STATE)
    state = module.FP8GlobalStateManager
    return state.get_fp8_recipe() if state.is_fp8_enabled() else None


def _stateless_fp8() -> bool:
    recipe = _recipe()
    return recipe is not None and not recipe.delayed()


def _product(x_RD: Tensor, weight_EFD: Tensor, rows: list[int]) -> Tensor:
    """Rows of expert e times the transpose of weight e; `rows` counts them."""
    carrier = _carrier(*weight_EFD.shape, weight_EFD.dtype, weight_EFD.device)
    for e, weight_FD in enumerate(weight_EFD.unbind(0)):
        setattr(carrier, f"weight{e}", weight_FD)
    try:
        return carrier(x_RD, rows)
    finally:
        for e in range(weight_EFD.shape[0]):
            setattr(carrier, f"weight{e}", None)


@cache
def _carrier(experts: int, width_out: int, width_in: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A GroupedLinear of these shapes whose weights are plain attributes, to be set before each call."""
    te: Any = packages.load(MODULE)
    carrier = te.GroupedLinear(experts, width_in, width_out, bias=False, params_dtype=dtype, device="meta")
    for e in range(experts):
        delattr(carrier, f"weight{e}")
        # The empty biases that stand for none were made on "meta" too.
        setattr(carrier, f"bias{e}", torch.empty(0, dtype=dtype, device=device))
    return carrier
