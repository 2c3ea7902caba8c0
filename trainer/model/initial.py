"""Draw initial values of parameters from the distributions of `trainer.kinds.base.Init`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer import mup
from trainer.kinds.base import Init, Parameter
from trainer.modelspec import ModelSpec


def draw(spec: ModelSpec, parameter: Parameter, block: Tensor, generator: torch.Generator) -> None:
    """Fill some rows of a parameter."""
    law, low, high, floor = parameter.init
    if law == "constant":
        block.fill_(low)
    elif law == "uniform":
        block.uniform_(low, high, generator=generator)
    elif law == "log_uniform":
        block.uniform_(low, high, generator=generator).log_()
    elif law == "softplus_inverse":
        block.uniform_(math.log(low), math.log(high), generator=generator)
        value = block.exp().clamp(min=floor)
        block.copy_(value + torch.log(-torch.expm1(-value)))
    else:
        block.normal_(0, _std(spec, parameter.init, parameter.shape), generator=generator)


def _std(spec: ModelSpec, init: Init, shape: tuple[int, ...]) -> float:
    if init.law == "table":
        return spec.init_std
    std = mup.init_std(spec, *shape[-2:])
    return std / math.sqrt(spec.num_sublayers) if init.law == "residual" else std
