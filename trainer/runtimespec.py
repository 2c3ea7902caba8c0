"""The part of a TrainSpec about the processes of a run: device, checks at the start, limits. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.fabric import FabricName
from trainer.kinds.base import Count
from trainer.specbase import Spec

Positive = Annotated[float, Field(gt=0)]
Policy = Literal["none", "selective", "full"]  # of activation checkpointing (trainer/model/recompute.py)


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
    activation_checkpointing: Policy = "none"  # trainer/model/recompute.py
    log_every_steps: Count = 10
    metrics_port: Annotated[int, Field(ge=0, le=65000)] = 9400
    communication_timeout_seconds: Count = 600
    hang_timeout_seconds: Count = 1800
    max_restarts: Annotated[int, Field(ge=0)] = 10
    deadline_seconds: Count | None = None
    preflight: PreflightSpec = PreflightSpec()
    prove: bool = True
