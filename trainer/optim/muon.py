"""Muon: momentum, orthogonalised, for matrices (Jordan 2024; scale of Moonlight, arXiv 2502.16982).

Matrices of one shape are orthogonalised together, in one batched product: a mixture of experts has thousands of small
ones, which one by one would cost more in launches than in arithmetic.

Shape suffixes: N matrices, m rows, n columns of one block (after the cuts of rules.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Coefficients = Literal["polar_express", "newton_schulz"]

# Quintic that maximises the slope at zero (Jordan 2024); singular values end anywhere in about 0.7..1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Minimax quintics for five steps (Amsel et al., arXiv 2505.16932), with their safety factor of 1.02 worked in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# After those five the values are near 1, where this one (Padé, p(1)=1 and p'(1)=p''(1)=0) converges.
POLISH = (1.875, -1.25, 0.375)

# Elements orthogonalised in one batch; bounds the temporary memory to a few GiB whatever the number of experts.
MAX_BATCH_ELEMENTS = 2**28


def iteration(coefficients: Coefficients, steps: int) -> tuple[tuple[tuple[float, float, float], ...], float]:
    """(a, b, c) of each step X ← aX + (bG + cG²)X with G = XXᵀ, and the factor on the Frobenius norm before it."""
    if coefficients == "newton_schulz":
        return (NEWTON_SCHULZ,) * steps, 1.0
    return POLAR_EXPRESS[:steps] + (POLISH,) * (steps - len(POLAR_EXPRESS)), 1.02


def orthogonalise(
    x_Nmn: Tensor, coefficients: Coefficients = "polar_express", steps: int = 5, dtype: torch.dtype | None = None
) -> Tensor:
    """The nearest (semi-)orthogonal matrix UVᵀ of each matrix UΣVᵀ, approximately; a zero matrix stays zero.

    Args:
        x_Nmn: a batch of matrices.
        dtype: of the iteration; by default bfloat16 on CUDA, where it is as good and far faster, else float32.

    Returns:
        [N, m, n] in the iteration's dtype.
    """
    per_step, safety = iteration(coefficients, steps)
    dtype = dtype or (torch.bfloat16 if x_Nmn.is_cuda else torch.float32)
    tall = x_Nmn.shape[-2] > x_Nmn.shape[-1]
    x_Nmn = x_Nmn.mT if tall else x_Nmn  # the Gram matrix is then the smaller of the two
    # The floor only guards 0/0: a gradient of any size, however small, gets the same direction.
    wide = torch.promote_types(x_Nmn.dtype, torch.float32)
    norm_N11 = torch.linalg.matrix_norm(x_Nmn, keepdim=True, dtype=wide).mul_(safety).clamp_(min=1e-30)
    x_Nmn = (x_Nmn / norm_N11).to(dtype)
    for a, b, c in per_step:
        gram_Nmm = torch.bmm(x_Nmn, x_Nmn.mT)
        poly_Nmm = torch.baddbmm(gram_Nmm, gram_Nmm, gram_Nmm, beta=b, alpha=c)
        x_Nmn = torch.baddbmm(x_Nmn, poly_Nmm, x_Nmn, beta=a)
    return x_Nmn.mT if tall else x_Nmn


def block_views(x: Tensor, block_rows: tuple[int, ...]) -> list[Tensor]:
    """`x` as views [N, m, n]: neighbouring blocks of equal height share one view. A 3-D tensor is one view already."""
    if x.dim() == 3:
        return [x]
    if not block_rows:
        return [x.unsqueeze(0)]
    starts = [0]
    for i, (above, below) in enumerate(pairwise(block_rows), start=1):
        if above != below:
            starts.append(i)
    views, row = [], 0
    for start, end in pairwise([*starts, len(block_rows)]):
        height = sum(block_rows[start:end])
        views.append(x.narrow(0, row, height).unflatten(0, (end - start, block_rows[start])))
        row += height
    assert row == x.shape[0], f"blocks cover {row} of {x.shape[0]} rows"
    return views


class Muon(torch.optim.Optimizer):
    """W ← W − lr·λ·W − lr·0.2·√max(m, n)·ortho(update), for each block [m, n] of each weight.

    The scale gives every block the root-mean-square update 0.2 that AdamW typically has, so that both share one
    learning rate. The decay is decoupled and not scaled, as in AdamW.

    Args:
        params: groups; a group may carry "block_rows", one tuple for each of its parameters (see `block_views`).
        iteration_dtype: see `orthogonalise`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        coefficients: Coefficients = "polar_express",
        steps: int = 5,
        iteration_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "coefficients": coefficients,
            "steps": steps,
            "iteration_dtype": iteration_dtype,
            "block_rows": None,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["block_rows"] = group["block_rows"] or [()] * len(group["params"])
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes [m, n] or [N, m, n], not {tuple(parameter.shape)}; give it to AdamW")
                # At once, not at the first step: a checkpoint is loaded into state that is already there.
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        pairs = zip(group["params"], group["block_rows"], strict=True)
        active = [(p, rows) for p, rows in pairs if p.grad is not None]
        if not active:
            return
        weights = [p for p, _ in active]
        momenta = [self.state[p]["momentum"] for p in weights]
        gradients = [p.grad for p in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])

        # (weight, momentum, gradient) views of every block, gathered by shape so that each shape is one batch.
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for (weight, rows), momentum, gradient in zip(active, momenta, gradients, strict=True):
            views = zip(*(block_views(x, rows) for x in (weight, momentum, gradient)), strict=True)
            for weight_Nmn, momentum_Nmn, gradient_Nmn in views:
                for chunk in _chunks(weight_Nmn, momentum_Nmn, gradient_Nmn):
                    by_shape[weight_Nmn.shape[-2], weight_Nmn.shape[-1]].append(chunk)
        for (m, n), chunks in by_shape.items():
            rate = group["lr"] * 0.2 * math.sqrt(max(m, n))
            for batch in _batches(chunks):
                self._update(batch, group, rate)

    def _update(self, batch: list[tuple[Tensor, Tensor, Tensor]], group: dict[str, Any], rate: float) -> None:
        if group["nesterov"]:
            directions = [gradient.add(momentum, alpha=group["momentum"]) for _, momentum, gradient in batch]
        else:
            directions = [momentum for _, momentum, _ in batch]
        update_Nmn = orthogonalise(
            torch.cat(directions), group["coefficients"], group["steps"], group["iteration_dtype"]
        )
        parts = update_Nmn.split([weight_Nmn.shape[0] for weight_Nmn, _, _ in batch])
        for (weight_Nmn, _, _), part_Nmn in zip(batch, parts, strict=True):
            weight_Nmn.add_(part_Nmn.to(weight_Nmn.dtype), alpha=-rate)


def _chunks(*views: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views [N, m, n] cut along N into pieces of at most MAX_BATCH_ELEMENTS."""
    size = max(1, MAX_BATCH_ELEMENTS // (views[0].shape[-2] * views[0].shape[-1]))
    return zip(*(view.split(size) for view in views), strict=True)


def _batches(chunks: list[tuple[Tensor, Tensor, Tensor]]) -> Iterable[list[tuple[Tensor, Tensor, Tensor]]]:
    """Runs of chunks that stay within MAX_BATCH_ELEMENTS together."""
    batch: list[tuple[Tensor, Tensor, Tensor]] = []
    elements = 0
    for chunk in chunks:
        if batch and elements + chunk[0].numel() > MAX_BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(chunk)
        elements += chunk[0].numel()
    if batch:
        yield batch
