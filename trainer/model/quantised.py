"""A model whose large weights are INT8 or FP8 (trainer/ops/quantised.py): which they are, and the modules with them.

Converted are all matrices that may be multiplied in FP8 (trainer/fp8/table.py), experts each by itself, and besides
them what is large: token embeddings, LM head and the tables of Engram, row by row. The router, the time steps of
Mamba-2, norms, filters and biases stay as they are: they are small, and a small error there changes much.

A converted weight keeps its name; its scales have the name with `_scale` behind it.

Legend: E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kinds.base import LOOKED_UP, Parameter
from trainer.model.linear import Linear
from trainer.modelspec import ModelSpec
from trainer.ops.quantised import DTYPES, Kind, Quantised, dequantised, product, quantise
from trainer.parameters import LM_HEAD, parameters

SCALE = "_scale"


def converts(parameter: Parameter) -> bool:
    """Whether a parameter is stored as INT8 or FP8."""
    is_module = parameter.per_expert or parameter.name.endswith(".weight")
    return is_module and parameter.high_precision in ("", LOOKED_UP, LM_HEAD)


def quantised_state(spec: ModelSpec, state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The state dict of a model with plain weights as that of a quantised one.

    Raises:
        ValueError: naming a weight that has Inf or NaN.
    """
    assert spec.lora is None, "exports have no adapters, they are merged"
    chosen = {parameter.name for parameter in parameters(spec) if converts(parameter)}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in chosen:
            made[name] = tensor
            continue
        try:
            made[name], made[name + SCALE] = quantise(tensor, kind)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return made


def install(model: nn.Module, spec: ModelSpec, kind: Kind, dtype: torch.dtype) -> None:
    """Give a model on "meta" the modules of a quantised one, to be filled by the state dict.

    Args:
        dtype: of the residual stream, in which rows of tables are looked up.
    """
    for parameter in parameters(spec):
        if not converts(parameter):
            continue
        owner, _, name = parameter.name.rpartition(".")
        module, shapes = model.get_submodule(owner), (parameter.shape, parameter.shape[:-1])
        numbers, scale = (
            torch.empty(shape, dtype=t, device="meta")
            for shape, t in zip(shapes, (DTYPES[kind], torch.float32), strict=True)
        )
        if parameter.per_expert:
            assert hasattr(module, "quantised"), f"{owner} has no way to compute with {name} as {kind}"
            delattr(module, name)
            module.register_buffer(name, numbers)
            module.register_buffer(name + SCALE, scale)
            module.quantised = True
            continue
        assert isinstance(module, Linear | nn.Embedding), f"{owner} has no way to compute with {name} as {kind}"
        weight = Quantised(numbers, scale)
        new = QuantisedLinear(weight, module.bias) if isinstance(module, Linear) else QuantisedTable(weight, dtype)
        holder, _, name = owner.rpartition(".")
        setattr(model.get_submodule(holder), name, new)


class QuantisedWeight(nn.Module):
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Quantised) -> None:
        super().__init__()
        self.register_buffer("weight", weight.numbers)
        self.register_buffer("weight_scale", weight.scale)

    def product(self, x: Tensor) -> Tensor:
        return product(x, Quantised(self.weight, self.weight_scale))

    def dequantised(self) -> Tensor:
        return dequantised(Quantised(self.weight, self.weight_scale))


class QuantisedLinear(QuantisedWeight):
    """In the place of a `Linear`."""

    def __init__(self, weight: Quantised, bias: nn.Parameter | None) -> None:
        super().__init__(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return product(x, Quantised(self.weight, self.weight_scale), self.bias)


class QuantisedTable(QuantisedWeight):
    """In the place of an `nn.Embedding`."""

    def __init__(self, weight: Quantised, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.dtype = dtype

    def forward(self, index: Tensor) -> Tensor:
        """Rows of FP32 precision in `dtype`."""
        return (self.weight[index].float() * self.weight_scale[index][..., None]).to(self.dtype)


def stack(module: Any, name: str) -> Quantised:
    """The matrices of all experts that a mixer holds under a name."""
    return Quantised(getattr(module, name), getattr(module, name + SCALE))
