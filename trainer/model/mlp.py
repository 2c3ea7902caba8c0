"""Squared-ReLU MLP without gate (So et al. 2021): down · relu(up · x)²."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer.model.linear import Linear
from trainer.model.recompute import Recomputed
from trainer.modelspec import MlpSpec


class SquaredReluMlp(Recomputed):
    def __init__(self, hidden: int, spec: MlpSpec) -> None:
        super().__init__()
        self.up = Linear(hidden, spec.width)
        self.down = Linear(spec.width, hidden)

    def project(self, x_BTD: Tensor) -> Tensor:
        return self.up(x_BTD)

    def mix(self, hidden_BTF: Tensor) -> Tensor:
        return self.region("selective", lambda hidden_BTF: self.down(F.relu(hidden_BTF).square()), hidden_BTF)
