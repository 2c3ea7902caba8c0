"""Resolve a ParallelSpec for a number of ranks: the groups that share weights and experts. Imports no torch.

Ranks are laid out twice, as rows of two tables; neighbouring ranks, which are on one node, share most:

    dense weights    replicate × shard     each row holds one copy of the weights between its ranks (FSDP; ddp: 1 rank)
    experts          replicas × expert     each row holds one set of the experts between its ranks

With `expert` above 1 the experts are sharded only by that axis, whatever shards the other weights. Small parameters
that stay FP32 in a step (norms, convolutions, routers, Mamba's scalars: 0.2% of the large presets) are always
replicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.errors import SpecError
from trainer.kinds.base import Parameter
from trainer.modelspec import ModelSpec
from trainer.spec import ParallelSpec


@dataclass(frozen=True)
class Layout:
    """A mesh that fits. `shard` ranks hold one copy of the dense weights, `expert` ranks one set of the experts."""

    world: int = 1
    data: Literal["ddp", "fsdp"] = "ddp"
    shard: int = 1
    expert: int = 1
    shard_optimizer: bool = False

    @property
    def replicate(self) -> int:
        """Copies of the dense weights."""
        return self.world // self.shard

    @property
    def replicas(self) -> int:
        """Sets of the experts."""
        return self.world // self.expert

    def __str__(self) -> str:
        """Copies x ranks of one copy; without spaces, since it is a metric's label too."""
        parts = [f"{self.data}={self.replicate}x{self.shard}", f"experts={self.replicas}x{self.expert}"]
        return ",".join([*parts, f"optimizer=1x{self.world}"] if self.shard_optimizer else parts)

    def held(self, parameter: Parameter) -> int:
        """Elements of a parameter that the fullest rank keeps between two steps. Both cuts are along dimension 0."""
        if self.cuts_experts(parameter):
            ranks = self.expert
        else:
            ranks = 1 if parameter.whole else self.shard
        return math.ceil(parameter.shape[0] / ranks) * math.prod(parameter.shape[1:])

    def cuts_experts(self, parameter: Parameter) -> bool:
        """Whether a parameter is cut by the axis of the experts."""
        return self.expert > 1 and parameter.per_expert

    def copied(self, parameter: Parameter) -> bool:
        """Whether a GPU has a copy of a weight in the dtype of products (trainer/ops/narrow.py): of experts that
        FSDP2 does not gather."""
        return parameter.per_expert and parameter.multiplies and (self.data == "ddp" or self.cuts_experts(parameter))


def resolve(
    parallel: ParallelSpec,
    model: ModelSpec,
    world: int,
    ranks_per_node: int,
    fits: Callable[[Layout], bool] = lambda _: True,
) -> Layout:
    """The mesh for `world` ranks. `auto` is ddp, or where its state does not fit, fsdp on each node, or over all ranks.

    Raises:
        SpecError: no such mesh exists, in one line.
    """
    _check_experts(parallel, model, world)
    if parallel.data == "ddp" and parallel.shard is not None:
        raise SpecError(
            "train.parallel.shard is for fsdp, train.parallel.data is ddp; remove shard or write data: fsdp"
        )
    if parallel.shard_optimizer and (parallel.data == "fsdp" or parallel.shard is not None):
        raise SpecError(
            "train.parallel.shard_optimizer is for ddp: fsdp shards the optimizer already; remove one of them"
        )
    if parallel.shard is not None and world % parallel.shard:
        possible = ", ".join(map(str, _divisors(world)[1:]))  # a share of 1 is what ddp is
        raise SpecError(
            f"train.parallel.shard {parallel.shard} does not divide the {world} ranks (nodes × GPUs of a node); "
            + (f"write one of {possible}" if possible else "remove it")
        )
    replicated = Layout(world, "ddp", 1, parallel.expert, parallel.shard_optimizer)
    node = ranks_per_node if 1 < ranks_per_node < world and world % ranks_per_node == 0 else world
    widths = [parallel.shard] if parallel.shard is not None else sorted({node, world})
    sharded = [Layout(world, "fsdp", width, parallel.expert) for width in widths]
    if parallel.data == "ddp" or parallel.shard_optimizer or world == 1:
        return replicated
    candidates = sharded if parallel.data == "fsdp" or parallel.shard is not None else [replicated, *sharded]
    return next((layout for layout in candidates if fits(layout)), candidates[-1])


def _check_experts(parallel: ParallelSpec, model: ModelSpec, world: int) -> None:
    if parallel.expert == 1:
        return
    if not any("E" in layer for layer in model.layers):
        raise SpecError(f"train.parallel.expert {parallel.expert}: train.model.layers has no experts (E); write 1")
    assert model.moe is not None
    number = model.moe.num_experts
    possible = [n for n in _divisors(world) if number % n == 0]
    if world % parallel.expert or number % parallel.expert:
        raise SpecError(
            f"train.parallel.expert {parallel.expert} must divide the {world} ranks (nodes × GPUs of a node) and the "
            f"{number} experts; write one of {', '.join(map(str, possible))}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
