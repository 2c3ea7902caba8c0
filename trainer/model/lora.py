"""Adapters (trainer/lora.py) in a model: attach them, compute them for stacks of matrices, merge them.

A `Linear` adds the products of its own adapters (trainer/model/linear.py). Experts are computed by functions of whole
stacks, so W + α/r · B A is computed for them in each pass. It is as large as the experts, so it is recomputed in the
backward pass instead of being kept.

Legend: E experts, O outputs, I inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.kinds.base import Kind
from trainer.lora import DOWN, UP, is_adapter
from trainer.model.linear import Linear
from trainer.modelspec import ModelSpec
from trainer.ops.experts import compute_dtype
from trainer.parameters import mixer_parameters


def attach(model: ModelSpec, section: Kind, mixer: nn.Module) -> None:
    """Add the adapters of the model's spec to a mixer."""
    if model.lora is None:
        return
    for parameter in mixer_parameters(model, section):
        if is_adapter(parameter.name):
            owner, _, name = parameter.name.rpartition(".")
            module = mixer.get_submodule(owner)
            assert module is mixer or isinstance(module, Linear), f"{owner} computes no adapters"
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
            module.lora_scale = model.lora.scale


class Stack(NamedTuple):
    """Matrices that are one parameter on this rank, and their adapters."""

    weight_EOI: Tensor
    down_ErI: Tensor
    up_EOr: Tensor
    scale: float

    def sum(self, first: int = 0, last: int | None = None) -> Tensor:
        """W + α/r · B A of the matrices [first, last), in FP32."""
        weight_eOI, down_erI, up_eOr = (tensor[first:last].float() for tensor in self[:3])
        with torch.autocast(weight_eOI.device.type, enabled=False):
            return torch.baddbmm(weight_eOI, up_eOr, down_erI, alpha=self.scale)


def with_stacks(
    mixer: nn.Module, names: Sequence[str], x: Tensor, function: Callable[..., Tensor], *, keep: bool
) -> Tensor:
    """function(*matrices), with the named parameters of a mixer [E, O, I] or this rank's part of them. Matrices with
    adapters include their products, in the dtype of matrix products on x.

    Args:
        keep: let autograd keep the sums, because other hooks already handle saved tensors.
    """
    matrices, made = [], {}
    for name in names:
        weight_EOI = _own(mixer, name)
        if (down_ErI := _own(mixer, f"{name}_{DOWN}")) is not None:
            stack = Stack(weight_EOI, down_ErI, _own(mixer, f"{name}_{UP}"), mixer.lora_scale)
            weight_EOI = stack.sum().to(compute_dtype(x))
            made[weight_EOI.untyped_storage()._cdata] = stack
        matrices.append(weight_EOI)
    if not made or keep or torch.compiler.is_compiling():
        return function(*matrices)

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        stack = made.get(saved.untyped_storage()._cdata)
        return saved if stack is None else _made_again(stack, saved)

    with saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept()):
        return function(*matrices)


def summed(mixer: nn.Module, name: str) -> Tensor:
    """A stack of matrices with the products of its adapters, if it has any; without gradient."""
    weight_EOI: Tensor = _own(mixer, name)
    if (down_ErI := _own(mixer, f"{name}_{DOWN}")) is None:
        return weight_EOI
    with torch.no_grad():
        return Stack(weight_EOI, down_ErI, _own(mixer, f"{name}_{UP}"), mixer.lora_scale).sum().to(weight_EOI.dtype)


def _made_again(stack: Stack, view: Tensor) -> Callable[[], Tensor]:
    """A function that recomputes a view of a stack's sum after the sum has been freed."""
    dtype, size, stride, start = view.dtype, view.size(), view.stride(), view.storage_offset()
    each = stack.weight_EOI[0].numel()
    end = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))  # its last element
    first, last = start // each, end // each + 1

    def make() -> Tensor:
        with torch.no_grad():
            return stack.sum(first, last).to(dtype).as_strided(size, stride, start - first * each)

    return make


def _own(module: nn.Module, name: str) -> Any:
    parameter: Any = getattr(module, name, None)
    # Gradients are declared with the parameter's placements; `trainer.parallel.gradients.average` makes that true.
    return parameter.to_local() if hasattr(parameter, "placements") else parameter


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Add the products of all adapters to their matrices, in FP64, and remove the adapters."""
    for each in module.modules():
        for name in [name for name, _ in each.named_parameters(recurse=False) if name.endswith(DOWN)]:
            stem = name.removesuffix(DOWN)
            down, up = (getattr(each, f"{stem}{end}") for end in (DOWN, UP))
            weight = getattr(each, stem.removesuffix("_") or "weight")
            for matrix, b, a in zip(*(t.unbind(0) if t.dim() == 3 else [t] for t in (weight, up, down)), strict=True):
                matrix.copy_(matrix.double() + each.lora_scale * (b.double() @ a.double()))
            for end in (DOWN, UP):
                each.register_parameter(f"{stem}{end}", None)
