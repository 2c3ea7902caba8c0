"""Linear layer of the model: torch's, except for BF16 on CPUs without BF16 instructions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in


class Linear(nn.Linear):
    """y = x·wᵀ, in the autocast dtype if autocast is on; most have no bias. Adapters (trainer/lora.py) add to it."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter
    lora_scale: float = 1.0

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.register_parameter("lora_A", None)

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self.weight, self.bias)
        if self.lora_A is None:
            return y
        return torch.add(y, product(product(x, self.lora_A), self.lora_B), alpha=self.lora_scale)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·wᵀ + b as `Linear` computes it."""
    dtype = compute_dtype(x)
    wide = computed_in(dtype, x.device)
    if wide == dtype:
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        added = None if bias is None else bias.to(dtype).to(wide)
        return F.linear(x.to(dtype).to(wide), weight.to(dtype).to(wide), added).to(dtype)
