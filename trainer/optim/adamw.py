"""AdamW (Loshchilov & Hutter 2019) on the rows that this rank owns, with moments in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from trainer.optim.shares import Share, local

# Elements for which moments are widened to float32 at a time.
WIDENED_ELEMENTS = 2**26


class AdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, whose arithmetic it calls; bfloat16 moments are widened for it and rounded once.

    Rounding is to nearest. A step moves a moment by about (1 − β) of its size, 5% at β₂ = 0.95, and bfloat16 resolves
    0.4%, so nothing is lost that stochastic rounding would save; OptimizerSpec refuses decays for which that is not so.

    Args:
        params: groups; a group may carry "shares", one for each of its parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "shares": None}
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["shares"] = group["shares"] or [Share(parameter) for parameter in group["params"]]
            for parameter, share in zip(group["params"], group["shares"], strict=True):
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu"),
                    "exp_avg": share.zeros(state_dtype),
                    "exp_avg_sq": share.zeros(state_dtype),
                }

    @torch.no_grad()
    def step(self, closure: None = None, skip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient.

        Args:
            skip: see trainer/optim/conditional.py.
        """
        assert closure is None, "AdamW evaluates no closure"
        found_inf = None if skip is None else skip.float()  # at 1 torch's kernels return at once
        counted = 1 if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            found = []
            for parameter, share in zip(group["params"], group["shares"], strict=True):
                state = self.state[parameter]
                if (gradient := share.gradient) is None:
                    continue
                if not gradient.numel():  # this rank has no row of it; the count goes on all the same
                    state["step"] += counted
                    continue
                moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
                found.append((share.weight, gradient, *moments, state["step"]))
            if found and found[0][0].dtype == found[0][2].dtype:
                _apply(group, found_inf, *map(list, zip(*found, strict=True)))
                continue
            for *tensors, step in found:
                _apply_widened(group, found_inf, tensors, step)
                step += counted


def _apply(group: dict[str, Any], found_inf: Tensor | None, *lists: list[Tensor]) -> None:
    """The update of parameters, from lists of weights, gradients, first and second moments, and steps."""
    weights, gradients, averages, squares, steps = lists
    beta1, beta2 = group["betas"]
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
    adamw(
        weights,
        gradients,
        averages,
        squares,
        [],
        steps,
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        **options,
    )


def _apply_widened(group: dict[str, Any], found_inf: Tensor | None, tensors: list[Tensor], step: Tensor) -> None:
    """As `_apply`, for one parameter with narrow moments, some rows at a time; the caller counts the step."""
    rows = max(1, WIDENED_ELEMENTS // max(1, tensors[0][:1].numel()))
    for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        weight, gradient, *moments = parts
        wide = [moment.float() for moment in moments]
        _apply(group, found_inf, [weight], [gradient], [wide[0]], [wide[1]], [step.clone()])
        torch._foreach_copy_(moments, wide)
