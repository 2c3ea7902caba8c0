"""LoRA (Hu et al., arXiv 2106.09685): frozen matrices, each with a trained product of two low-rank matrices.

    y = W x + α/r · B A x        W [out, in] frozen, A [r, in] initially random, B [out, r] initially zero

A and B are the adapters of W. A kind declares which of its matrices may have adapters (`Kind.adaptable`); everything
that loops over parameters then includes them. `trainer.model.lora` computes and merges them. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.kinds.base import ZEROS, Count, Init, Parameter
from trainer.specbase import Spec

DOWN, UP = "lora_A", "lora_B"  # the last part of adapters' names, as in peft


class LoraSpec(Spec):
    """Train only adapters of rank `rank`, whose products are scaled by `alpha` / `rank`. All other weights are frozen.

    `targets`: names of matrices by section of the model (attention: [q_proj, v_proj]); without it all matrices of the
    mixers, including experts. Embedding, head, norms, convolutions, routers and Engram have no adapters.
    """

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: dict[str, list[str]] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.targets is not None and not (self.targets and all(self.targets.values())):
            raise ValueError("targets names no matrix; name one or more in each section, or leave out targets for all")
        return self

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return self.alpha / self.rank

    @property
    def named(self) -> str:
        """The targets in words."""
        if self.targets is None:
            return "all matrices of the mixers"
        return "; ".join(f"{section} {', '.join(names)}" for section, names in self.targets.items())

    def takes(self, section: str, name: str) -> bool:
        """Whether a matrix that may have adapters gets them."""
        return self.targets is None or name in self.targets.get(section, ())


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name is A or B of a matrix."""
    return name.endswith((DOWN, UP))


def plain(name: str) -> str:
    """A matrix's name in `targets`: the name of its parameter in the mixer."""
    return name.removesuffix(".weight")


def adapters(matrix: Parameter, rank: int) -> Iterator[Parameter]:
    """A and B of a matrix, or of each matrix in a stack. A is initialised as in peft, U(−1/√in, 1/√in); B is zero."""
    *stack, rows, columns = matrix.shape
    bound = 1 / math.sqrt(columns)
    at = plain(matrix.name) + ("." if matrix.name.endswith(".weight") else "_")
    for name, shape, init in (
        (DOWN, (rank, columns), Init("uniform", -bound, bound)),
        (UP, (rows, rank), ZEROS),
    ):
        yield replace(
            matrix,
            name=f"{at}{name}",
            shape=(*stack, *shape),
            active=matrix.active * math.prod(shape) // (rows * columns),
            init=init,
            optimizer="adamw",
            blocks=(),
            teon=False,
            frozen=False,
            high_precision="adapters (LoRA) are narrow",
        )
