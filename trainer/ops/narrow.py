"""Weights in the dtype of matrix products: one copy of each for as long as the weight stays as it is.

A weight is FP32, a product multiplies BF16. Cast where they are multiplied, experts are read and written once more in
both passes of every micro-batch; their copy is cast once for each optimizer step instead. It is a buffer that keeps its
address, and is filled before the first layer runs (`refresh`): compiled layers and passes that are computed again only
read it.

A copy is stale once the version of its weight is another one: every operation of torch that writes into a tensor, or
into a view of it, counts it up. What writes unseen has to say so (`torch.autograd.graph.increment_version`), as
`Optimizers.step` does for all weights: collectives, kernels of our own, and all that writes into the part of a cut
parameter after `detach`, from where on part and whole count each for itself.

Gradients: a product's is as narrow as the copy. Autograd would cast it to FP32 and add that to the parameter's. Where
neither DDP nor FSDP2 waits for what autograd hands to the parameter, autograd differentiates by the copy itself, whose
gradient is added to the parameter's in one pass and dropped, as soon as it is there: the same numbers, without the FP32
cast. `torch.autograd.grad` and hooks of the parameter do not see it; whoever captures a layer as a function of its
parameters has to take the copies as well.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class Copy:
    """The copy of one parameter of a module; of a cut parameter, of the part of this rank.

    `module.copies` holds it by the parameter's name, from the first `refresh` on.

    Args:
        adds: it takes gradients, and adds them to the parameter's.
    """

    def __init__(self, module: nn.Module, name: str, *, adds: bool = False) -> None:
        self._module, self._name, self._adds = module, name, adds
        self._of: Any = lambda: None  # weak: the parameter that was copied
        self._state: tuple[int, ...] | None = None  # its memory, and the versions of the whole and of the part

    def refresh(self, dtype: torch.dtype) -> None:
        """Cast the weight, unless the copy is that of what the weight is now."""
        parameter, copies = getattr(self._module, self._name), self._module.copies
        with torch.inference_mode(False), torch.no_grad():
            weight = own(parameter)  # within no_grad the part itself, whose version counts, not a view
        kept: Tensor | None = copies.get(self._name)
        fits = kept is not None and (kept.dtype, kept.shape, kept.device) == (dtype, weight.shape, weight.device)
        state = weight.untyped_storage()._cdata, parameter._version, weight._version
        if fits and self._of() is parameter and self._state == state:
            return
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or not fits:
                kept = copies[self._name] = self._made(weight, dtype)
            kept.copy_(weight)
        self._of, self._state = weakref.ref(parameter), state

    def _made(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        if self._adds:
            module, name = weakref.ref(self._module), self._name  # the module keeps the copy, which keeps its hook

            def add(copy: Tensor) -> None:
                owner = module()
                assert owner is not None, "the module whose copy this is"
                _add(getattr(owner, name), copy)

            copy.requires_grad_().register_post_accumulate_grad_hook(add)
        return copy


@torch.no_grad()
def _add(parameter: nn.Parameter, copy: Tensor) -> None:
    """The gradient of a copy to that of its parameter; of a cut parameter, to this rank's part of it."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter, requires_grad=False)
        own(parameter.grad).copy_(copy.grad)
    else:
        own(parameter.grad).add_(copy.grad)
    copy.grad = None


def in_place_of(weight: Tensor, copy: Tensor) -> Tensor:
    """The copy, whose gradient is cast to the dtype of the weight and is the weight's; or if it takes gradients itself,
    the copy as it is."""
    return copy if copy.requires_grad else _Narrowed.apply(weight, copy)


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; shares its memory."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None
