"""The part of a TrainSpec about the processes of a run: device, checks at the start, limits. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from trainer.fabric import FabricName
from trainer.kinds.base import Count
from trainer.specbase import Spec


def word_or_number(value: Any) -> str:
    """Which member of a union a value is meant for, so that a wrong one gives one error."""
    return "word" if isinstance(value, str) and not value.replace(".", "", 1).isdigit() else "number"


def word_or_mapping(value: Any) -> str:
    """See `word_or_number`."""
    return "mapping" if isinstance(value, dict | Spec) else "word"


Positive = Annotated[float, Field(gt=0)]
Policy = Literal["none", "selective", "full", "sqrt"]  # of activation checkpointing (trainer/model/recompute.py)
OF_ALL_LAYERS = ("none", "selective", "full")  # of them those under which all layers are treated alike
Budget = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[Literal["auto"], Tag("word")], Discriminator(word_or_number)
]


class RecomputeSpec(Spec):
    """Whole layers that are recomputed in the backward pass, while the others keep everything; one of these:

    `every`: each n-th layer, from the first on. `layers`: as many as this, those that save the most. `budget_gib`: the
    fewest with which a step fits, by arithmetic, in this much memory of each rank; auto takes what its GPU has.
    """

    every: Annotated[int, Field(ge=2)] | None = None
    layers: Count | None = None
    budget_gib: Budget | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"these are {len(given)}: {', '.join(given)}; null takes one away" if given else "there is none"
            raise ValueError(f"write one of every, layers and budget_gib ({said})")
        return self

    def __str__(self) -> str:
        if self.budget_gib is not None:
            return "budget auto" if self.budget_gib == "auto" else f"budget {self.budget_gib:g} GiB"
        return f"every {self.every}" if self.every else f"{self.layers} layers"


Recomputing = Annotated[
    Annotated[Policy, Tag("word")] | Annotated[RecomputeSpec, Tag("mapping")], Discriminator(word_or_mapping)
]


class PreflightSpec(Spec):
    """Checks before the first step (trainer/preflight), a few seconds in all.

    Without a floor, suspiciously slow values only warn; a value below a given floor ends the start. Links between GPUs
    always have a floor, 0.1 GB/s. On a cluster, `min_shared_memory_gib` is cluster.shared_memory_gib, and `fabric`, the
    network that NCCL must take, is cluster.fabric where there are several nodes.
    """

    enabled: bool = True
    min_read_mb_per_second: Positive | None = None
    min_write_mb_per_second: Positive | None = None
    min_link_gb_per_second: Positive | None = None
    min_shared_memory_gib: Positive | None = None
    max_clock_skew_seconds: Positive = 5.0
    fabric: FabricName | None = None

    @model_validator(mode="after")
    def _fabric_is_checked(self) -> Self:
        if self.fabric and not self.enabled:
            raise ValueError("a fabric is named, and only preflight sees whether NCCL takes it; write enabled: true")
        return self


class RuntimeSpec(Spec):
    """How the processes run; nothing here changes what is computed beyond rounding.

    `compile`: layers by torch.compile; each kind of layer is compared with itself uncompiled first. true ends the start
    where the compiler fails or computes something else, auto goes on without it. `graphs`: layers as CUDA graphs, in a
    run on one GPU; compared in the same way. auto takes them where a trial shows that they are faster. `prove`: on a
    GPU without a parity record, compare the kernels that `auto` may take with their references first, and try what is
    the fastest (trainer/proof), minutes at most.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | Literal["auto"] = False
    graphs: bool | Literal["auto"] = "auto"
    activation_checkpointing: Recomputing = "none"  # trainer/model/recompute.py
    log_every_steps: Count = 10
    metrics_port: Annotated[int, Field(ge=0, le=65000)] = 9400
    communication_timeout_seconds: Count = 600
    hang_timeout_seconds: Count = 1800
    max_restarts: Annotated[int, Field(ge=0)] = 10
    deadline_seconds: Count | None = None
    preflight: PreflightSpec = PreflightSpec()
    prove: bool = True
