"""Squared-ReLU MLP without gate (So et al. 2021): down · relu(up · x)²."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.modelspec import MlpSpec


class SquaredReluMlp(nn.Module):
    def __init__(self, hidden: int, spec: MlpSpec) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, spec.width, bias=False)
        self.down = nn.Linear(spec.width, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BTD)).square())
