"""How Megatron-LM spreads a model over ranks: the section `train.megatron`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from trainer.kinds.base import Count
from trainer.specbase import Spec

Engine = Literal["yaongi", "megatron"]


class MegatronSpec(Spec):
    """What Megatron-LM needs beyond the fields that both engines read. It changes nothing of what is computed beyond
    rounding, and a run may be resumed with another one, except for `distributed_optimizer`.

    Ranks = data parallel × `tensor_parallel` × `pipeline_parallel` × `context_parallel` for all but experts, and
    expert data parallel × `expert_tensor_parallel` × `expert_parallel` × `pipeline_parallel` for experts.

    `virtual_pipeline`: parts of the model on each pipeline rank (interleaved schedule). `sequence_parallel`: norms
    and the residual stream are split over the tensor parallel ranks; by default if there are several.
    `distributed_optimizer`: FP32 weights and moments are split over the data parallel ranks. `overlap`: their exchange,
    and that of gradients, runs beside the computation. `workers`: processes of each rank that read tokens.
    """

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    virtual_pipeline: Count = 1
    context_parallel: Count = 1
    expert_parallel: Count = 1
    expert_tensor_parallel: Count = 1
    sequence_parallel: bool | None = None
    distributed_optimizer: bool = True
    overlap: bool = True
    workers: Count = 2

    @property
    def sharing(self) -> int:
        """Ranks that work on the same rows."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def splits_sequence(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor_parallel > 1 if self.sequence_parallel is None else self.sequence_parallel
