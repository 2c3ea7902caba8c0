"""Memory of a rank that trains by Megatron-LM, by arithmetic. Imports no torch.

Weights are BF16, gradients FP32 (as `accumulate_allreduce_grads_in_fp32` of BF16 training demands); AdamW keeps FP32
weights and two moments, which the distributed optimizer splits over the ranks with the same weights: (6 + 12 / DP)
bytes of each weight, as in Megatron's own theoretical_memory_usage.py, which however counts every expert on every rank.
Of activations it counts what Transformer Engine's layers keep with fused attention, split as in Korthikanti et al.
(arXiv 2205.05198); earlier pipeline stages keep those of more micro-batches, the last one has the logits.
"""

from __future__ import annotations

import re

from trainer.arithmetic.memory import RESERVED_BYTES, Memory
from trainer.errors import SpecError
from trainer.kinds.attention import AttentionSpec
from trainer.kinds.base import Kind, Parameter, first_rows
from trainer.kinds.mlp import MlpSpec
from trainer.kinds.moe import MoeSpec
from trainer.megatron.check import Mesh
from trainer.megatronspec import MegatronSpec
from trainer.parameters import parameters
from trainer.spec import TrainSpec

BF16_BYTES, FP32_BYTES = 2, 4
STATE_BYTES = 3 * FP32_BYTES
FP8_COPIES_BYTES = 2  # of a weight in FP8, and its transpose for the backward pass
LOGITS_BYTES = BF16_BYTES + 3 * FP32_BYTES  # logits; in FP32, their exponentials and their gradient
IMBALANCE = 1.5  # tokens of the fullest rank's experts over the mean; the loss that balances them takes some steps
_LAYER = re.compile(r"layers\.(\d+)\.")


def step_memory(spec: TrainSpec, mesh: Mesh) -> Memory:
    """Bytes on the fullest rank of the run; precision auto counts as FP8."""
    return max((_stage(spec, mesh, stage) for stage in range(mesh.pipeline)), key=lambda found: found.total)


def refuse_too_large(spec: TrainSpec, mesh: Mesh, gpu_bytes: float, holder: str) -> None:
    """Refuse a run that cannot fit.

    Args:
        holder: what has that memory, as the start of the message.

    Raises:
        SpecError: says how much is wanted for what, and what to change.
    """
    wanted = step_memory(spec, mesh)
    if wanted.total <= gpu_bytes:
        return
    if wanted.state + wanted.copies + wanted.reserved > gpu_bytes:
        remedy = "raise train.megatron.expert_parallel, tensor_parallel or pipeline_parallel, or use more GPUs"
    elif spec.runtime.activation_checkpointing == "full":
        remedy = "lower train.batch.micro_batch_rows, or raise train.megatron.context_parallel or tensor_parallel"
    else:
        remedy = (
            f"lower train.batch.micro_batch_rows {spec.batch.rows}, or write "
            "train.runtime.activation_checkpointing full"
        )
    raise SpecError(
        f"{holder} {gpu_bytes / 2**30:.1f} GiB is too little: weights, gradients and optimizer state take "
        f"{wanted.state / 2**30:.1f} GiB on each GPU ({mesh}), activations {wanted.activations / 2**30:.1f} GiB, "
        f"FP8 copies and reserve {(wanted.copies + wanted.reserved) / 2**30:.1f} GiB; {remedy}"
    )


def _stage(spec: TrainSpec, mesh: Mesh, stage: int) -> Memory:
    layout = spec.megatron or MegatronSpec()
    dense = experts = products = 0
    for parameter in _of_stage(spec, mesh, stage):
        if parameter.per_expert:
            held = parameter.count // (mesh.expert * mesh.expert_tensor)
            experts += held
        else:
            # Norms and the router are on every rank; vectors of split matrices are too small to matter.
            held = parameter.count // (mesh.tensor if len(parameter.shape) > 1 and not parameter.whole else 1)
            dense += held
        if parameter.multiplies and not parameter.high_precision:
            products += held
    copies = mesh.data * mesh.context, mesh.expert_data
    dense_ranks, expert_ranks = copies if layout.distributed_optimizer else (1, 1)
    return Memory(
        weights=BF16_BYTES * (dense + experts),
        gradients=FP32_BYTES * (dense + experts),
        optimizer=STATE_BYTES * (-(-dense // dense_ranks) - (-experts // expert_ranks)),
        copies=FP8_COPIES_BYTES * products if spec.precision.dtype in ("auto", "fp8") else 0,
        activations=_activations(spec, mesh, stage),
        reserved=RESERVED_BYTES,
    )


def layers_of(mesh: Mesh, stage: int, layers: int) -> list[int]:
    """The layers on a pipeline rank: with an interleaved schedule, of every `pipeline`-th part."""
    each = layers // (mesh.pipeline * mesh.virtual)
    starts = [(stage + part * mesh.pipeline) * each for part in range(mesh.virtual)]
    return [layer for start in starts for layer in range(start, start + each)]


def _of_stage(spec: TrainSpec, mesh: Mesh, stage: int) -> list[Parameter]:
    layers = set(layers_of(mesh, stage, len(spec.model.layers)))
    first, last = stage == 0, stage == mesh.pipeline - 1

    def held(parameter: Parameter) -> bool:
        if layer := _LAYER.match(parameter.name):
            return int(layer[1]) in layers
        if parameter.name == "embedding.weight":
            return first or (last and spec.model.tied_embedding)
        return last

    return [parameter for parameter in parameters(spec.model) if held(parameter)]


def _activations(spec: TrainSpec, mesh: Mesh, stage: int) -> int:
    """Bytes of the micro-batches that a stage keeps, and of the logits in the last."""
    model, policy = spec.model, spec.runtime.activation_checkpointing
    layout = spec.megatron or MegatronSpec()
    rows = mesh.tensor if layout.splits_sequence else 1
    kept = sum(_layer(spec, mesh, rows, layer) for layer in layers_of(mesh, stage, len(model.layers)))
    again = 0.0
    if policy == "full":
        again = max(_layer(spec, mesh, rows, layer, whole=True) for layer in range(len(model.layers)))
    at_once = _in_flight(mesh, stage)
    found = kept * at_once + again
    if stage == mesh.pipeline - 1:
        found += LOGITS_BYTES * model.vocab_size / mesh.tensor + 2 * BF16_BYTES * model.hidden / rows
    return round(found * spec.batch.rows * spec.tokens.seq_len / mesh.context)


def _in_flight(mesh: Mesh, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most (1F1B; interleaved as in Megatron's schedule)."""
    behind = mesh.pipeline - stage - 1
    if mesh.virtual == 1:
        return min(mesh.micro_batches, behind + 1)
    return min(mesh.micro_batches, (2 * behind + (mesh.virtual - 1) * mesh.pipeline + 1) / mesh.virtual)


def _layer(spec: TrainSpec, mesh: Mesh, rows: int, layer: int, *, whole: bool = False) -> float:
    """Bytes for each token that a layer keeps on a rank.

    Args:
        rows: ranks that share the rows of the residual stream.
        whole: what it keeps while it is computed again.
    """
    hidden, policy = spec.model.hidden, "none" if whole else spec.runtime.activation_checkpointing
    if policy == "full":
        return BF16_BYTES * hidden / rows
    sections = [spec.model.section(symbol, layer) for symbol in spec.model.layers[layer]]
    return sum(
        _sublayer(section, mesh, rows, hidden, again=policy == "selective")
        # The norm's input and output, of which experts' is computed again under selective.
        + BF16_BYTES * hidden * (1 if policy == "selective" and isinstance(section, MoeSpec) else 2) / rows
        for section in sections
    )


def _sublayer(section: Kind, mesh: Mesh, rows: int, hidden: int, *, again: bool) -> float:
    if isinstance(section, AttentionSpec):
        heads, groups = section.num_heads, section.num_kv_heads
        normed = heads + groups if section.qk_norm else 0
        width = (2 * heads + 2 * groups + normed) * section.head_dim * BF16_BYTES + heads * FP32_BYTES
        return width / mesh.tensor
    if isinstance(section, MlpSpec):
        return (sum(first_rows(section.activation, section.width)) + section.width) * BF16_BYTES / mesh.tensor
    assert isinstance(section, MoeSpec), "check knows attention, MLP and experts"
    before, after = sum(first_rows(section.activation, section.expert_width)), 0 if again else section.expert_width
    copies = section.top_k * IMBALANCE * (2 * hidden * mesh.expert_tensor + before + after) * BF16_BYTES
    shared = sum(first_rows(section.activation, section.shared_width)) + section.shared_width
    return (copies + section.num_experts * FP32_BYTES) / rows + shared * BF16_BYTES / mesh.tensor
