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
cast. A kernel may add it while it multiplies (`sum_of`), and autograd gets none. `torch.autograd.grad` and hooks of the
parameter do not see it; whoever asks for gradients of a layer has to ask for those of copies, too (`add`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Where the gradients of copies that take them are summed, by the memory of the copy, which is the same for whatever
# compiled code makes of it.
_SUMS: dict[int, Callable[[], nn.Parameter]] = {}


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
        # A CUDA graph runs when none of this is asked, so the cast belongs into it.
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if fits and self._of() is parameter and self._state == state and not captured:
            return
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or not fits:
                kept = copies[self._name] = self._made(weight, dtype)
            kept.copy_(weight)
        self._of, self._state = weakref.ref(parameter), state

    def _made(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        if self._adds:
            module, name = weakref.ref(self._module), self._name  # the module keeps the copy
            address = copy.untyped_storage()._cdata
            _SUMS[address] = lambda: getattr(module(), name)
            weakref.finalize(copy, _SUMS.pop, address).atexit = False
            copy.requires_grad_().register_post_accumulate_grad_hook(_add)
        return copy


@torch.no_grad()
def sum_of(copy: Tensor) -> tuple[Tensor, bool]:
    """Where the gradient of a copy that takes one is summed, FP32 in the shape of the copy, and whether there is a sum
    already: else it has to be written."""
    parameter = _SUMS[copy.untyped_storage()._cdata]()
    if begun := parameter.grad is not None:
        return own(parameter.grad), begun
    parameter.grad = torch.empty_like(parameter, requires_grad=False)
    return own(parameter.grad), begun


def _add(copy: Tensor) -> None:
    if copy.grad is not None:  # else a kernel has added it
        add(copy, copy.grad)
        copy.grad = None


@torch.no_grad()
def add(copy: Tensor, gradient: Tensor) -> None:
    """Add the gradient of a copy to the parameter's."""
    total, begun = sum_of(copy)
    if begun:
        total.add_(gradient)
    else:
        total.copy_(gradient)


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
