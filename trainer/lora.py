"""LoRA (Hu et al., arXiv 2106.09685): matrices that stay as they are, and a product of two narrow ones beside each.

    y = W x + α/r · B A x        W [out, in] as it was found, A [r, in] drawn, B [out, r] zero at first

A and B of a matrix are its adapters. A kind says which of its matrices may have them (`Kind.adaptable`); everything
that loops over parameters then has them too. `trainer.model.lora` computes and merges them. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.kinds.base import ZEROS, Count, Init, Parameter
from trainer.specbase import Spec

DOWN, UP = "lora_A", "lora_B"  # how the names of adapters end, as in peft


class LoraSpec(Spec):
    """Train adapters of `rank` alone, whose products count `alpha` / `rank` times. Everything else stays as it is.

    `targets`: names of matrices by section of the model (attention: [q_proj, v_proj]); without it all of the mixers,
    experts included. Embedding, head, norms, convolutions, routers and Engram have none.
    """

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: dict[str, list[str]] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.targets is not None and not (self.targets and all(self.targets.values())):
            raise ValueError("targets names no matrix; name one in each section, or leave targets out for all of them")
        return self

    @property
    def scale(self) -> float:
        """The factor on the products of adapters."""
        return self.alpha / self.rank

    @property
    def named(self) -> str:
        """Its targets in words."""
        if self.targets is None:
            return "all matrices of the mixers"
        return "; ".join(f"{section} {', '.join(names)}" for section, names in self.targets.items())

    def takes(self, section: str, name: str) -> bool:
        """Whether it is to train adapters of a matrix that may have some."""
        return self.targets is None or name in self.targets.get(section, ())


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is A or B of some matrix."""
    return name.endswith((DOWN, UP))


def plain(name: str) -> str:
    """A matrix's name in `targets`: that of its parameter in the mixer."""
    return name.removesuffix(".weight")


def adapters(matrix: Parameter, rank: int) -> Iterator[Parameter]:
    """A and B of a matrix, or of each in a stack. A begins as peft's does, U(−1/√in, 1/√in); B is zero."""
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
