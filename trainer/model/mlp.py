"""Squared-ReLU MLP without gate (So et al. 2021): down · relu(up · x)²."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer.kinds.mlp import MlpSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.modelspec import ModelSpec
from trainer.ops import Documents


class SquaredReluMlp(Mixer):
    def __init__(self, model: ModelSpec, spec: MlpSpec, functions: Functions) -> None:
        super().__init__()
        self.up = Linear(model.hidden, spec.width)
        self.down = Linear(spec.width, model.hidden)

    def project(self, x_BTD: Tensor) -> tuple[Tensor]:
        return (self.up(x_BTD),)

    def mix(self, hidden_BTF: Tensor, documents: Documents) -> Mixed:
        return Mixed(self.region("selective", lambda hidden_BTF: self.down(F.relu(hidden_BTF).square()), hidden_BTF))
