"""Gradient reductions that neither FSDP2 nor the optimizers do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.model.rows import own_rows

PACKED_ELEMENTS = 2**18  # smaller gradients travel together: a collective of their own would cost more than copying


def average(parameters: Iterable[Tensor], group: dist.ProcessGroup, ranks: int) -> None:
    """Sum over the ranks of `group` of these parameters' gradients, in place, divided by `ranks`.

    For parameters that every rank holds whole, `group` are all `ranks`; for cut experts, the ranks that hold the same
    ones, since a rank has the sum over those with which it exchanges tokens already. After the last backward of a step.
    """
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None, "a parameter of every pass, were it on no tokens"
        gradients.append(own_rows(parameter.grad)[0])
    if not gradients:
        return
    torch._foreach_div_(gradients, ranks)
    if group.size() == 1:
        return
    small = [gradient for gradient in gradients if gradient.numel() < PACKED_ELEMENTS]
    works = [dist.all_reduce(g, group=group, async_op=True) for g in gradients if g.numel() >= PACKED_ELEMENTS]
    if small:
        packed = torch.cat([gradient.flatten() for gradient in small])
        dist.all_reduce(packed, group=group)
        parts = packed.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(gradient) for part, gradient in zip(parts, small, strict=True)])
    for work in works:
        work.wait()


def unscale(scaler: torch.amp.GradScaler, parameters: Iterable[Tensor]) -> None:
    """Divide gradients by the loss scale, whole and cut ones alike.

    What one rank finds in its part (Inf, NaN) holds for all, or their loss scales would part.
    """
    own = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = own_rows(parameter.grad)[0]
            own.append(gradient.detach())
            own[-1].grad = gradient
    optimizer = torch.optim.SGD(own, lr=0.0)  # a scaler asks an optimizer for the gradients; this one never steps
    scaler.unscale_(optimizer)
    if dist.is_initialized():
        for found in scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
