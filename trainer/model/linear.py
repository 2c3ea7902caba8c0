"""Linear layer of the model: torch's, but for BF16 on CPUs that have no instructions for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in


class Linear(nn.Linear):
    """y = x·wᵀ, rounded to the dtype of autocast where it is on; the models have no biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        wide = computed_in(dtype, x.device)
        if wide == dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype).to(wide), self.weight.to(dtype).to(wide)).to(dtype)
