"""Routed experts on a CPU without gradient. Only those that were chosen are visited, one after the other; a few small
ones are all multiplied at once, as the number of calls is what takes the time.

Legend as in `trainer.ops.experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
SMALL = 2**18  # elements of all first matrices, up to which all are multiplied
FEW = 16  # tokens, up to which that is done


def experts_without_gradient(up_EGD: Tensor, down_EDF: Tensor, activation: str) -> Run:
    """A function (x_SD, expert_SK, weight_SK) → [S, D] as `trainer.ops.experts.experts_reference`."""
    activate = ACTIVATIONS[activation].value
    num_experts, rows, _ = up_EGD.shape
    wide = computed_in(compute_dtype(up_EGD), up_EGD.device)
    up_EDG, down_EFD = up_EGD.transpose(1, 2), down_EDF.transpose(1, 2)
    ups, downs = up_EDG.unbind(0), down_EFD.unbind(0)
    all_up_ND = all_down_MD = None
    if up_EGD.numel() <= SMALL:
        all_up_ND, all_down_MD = up_EGD.flatten(0, 1).to(wide), down_EFD.flatten(0, 1).to(wide)

    def of_all(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
        hidden_SEF = activate(F.linear(x_SD, all_up_ND).view(-1, num_experts, rows))
        weight_SE = weight_SK.new_zeros(len(x_SD), num_experts).scatter_(1, expert_SK, weight_SK)
        return hidden_SEF.mul_(weight_SE[..., None]).flatten(1) @ all_down_MD

    def of_one(x_1D: Tensor, expert_1K: Tensor, weight_1K: Tensor) -> Tensor:
        y_1D = torch.zeros_like(x_1D)
        for e, weight in zip(expert_1K[0].tolist(), weight_1K[0].tolist(), strict=True):
            y_1D.addmm_(activate(x_1D @ ups[e].to(wide)), downs[e].to(wide), alpha=weight)
        return y_1D

    def of_many(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
        top_k = expert_SK.shape[1]
        copies: dict[int, list[int]] = {}
        for copy, e in enumerate(expert_SK.flatten().tolist()):
            copies.setdefault(e, []).append(copy)
        copy_R = torch.tensor([copy for own in copies.values() for copy in own])
        token_R = copy_R // top_k
        x_RD = x_SD[token_R]
        before_RG, y_RD = x_RD.new_empty(len(x_RD), rows), torch.empty_like(x_RD)
        ends = list(accumulate(map(len, copies.values())))
        for e, end in zip(copies, ends, strict=True):
            own = slice(end - len(copies[e]), end)
            torch.mm(x_RD[own], ups[e].to(wide), out=before_RG[own])
        hidden_RF = activate(before_RG)
        for e, end in zip(copies, ends, strict=True):
            own = slice(end - len(copies[e]), end)
            torch.mm(hidden_RF[own], downs[e].to(wide), out=y_RD[own])
        y_RD.mul_(weight_SK.flatten()[copy_R, None])
        return torch.zeros_like(x_SD).index_add_(0, token_R, y_RD)

    def run(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
        with torch.autocast(x_SD.device.type, enabled=False):
            how = of_one if len(x_SD) == 1 else of_all if all_up_ND is not None and len(x_SD) <= FEW else of_many
            return how(x_SD.to(wide), expert_SK, weight_SK).to(x_SD.dtype)

    return run
