"""MLP: down · act(up · x), by squared ReLU without gate or by SwiGLU."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.kinds.base import first_rows
from trainer.kinds.mlp import MlpSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.ready import Ready, linear, normed
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.activation import ACTIVATIONS


class Mlp(Mixer):
    def __init__(self, model: ModelSpec, spec: MlpSpec, functions: Functions) -> None:
        super().__init__()
        self.spec = spec
        self.activate = ACTIVATIONS[spec.activation].value
        rows = first_rows(spec.activation, spec.width)
        setattr(self, spec.first, Linear(model.hidden, sum(rows), bias=spec.bias))
        self.down = Linear(spec.width, model.hidden, bias=spec.bias)

    def project(self, x_BTD: Tensor) -> tuple[Tensor]:
        return (getattr(self, self.spec.first)(x_BTD),)

    def mix(self, before_BTG: Tensor, documents: Documents) -> Mixed:
        return Mixed(self.region("selective", lambda before_BTG: self.down(self.activate(before_BTG)), before_BTG))

    def ready(self, norm: nn.Module) -> Ready:
        norm_D, first, down, activate = (
            normed(norm),
            linear(getattr(self, self.spec.first)),
            linear(self.down),
            self.activate,
        )
        return lambda x_BTD, step, state: down(activate(first(norm_D(x_BTD))))
