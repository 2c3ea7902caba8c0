"""Training memory of each rank, by arithmetic. Imports no torch.

Weights and gradients are always FP32; the optimizer state has the dtype in its spec.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

from trainer.arithmetic.activations import WIDTHS, activations
from trainer.errors import SpecError
from trainer.kinds.base import Parameter
from trainer.lora import DOWN, is_adapter
from trainer.modelspec import ModelSpec
from trainer.optim.rules import STATE_BYTES, assign
from trainer.parallel.layout import Layout, resolve
from trainer.parameters import head, parameters
from trainer.spec import OptimizerSpec, ParallelSpec, TrainSpec

FP32_BYTES = 4
RESERVED_BYTES = 2 * 2**30
SHARDED_ABOVE = 0.5  # of a GPU's memory: if ddp's state leaves less than half for activations, auto takes fsdp


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        gathered: parameters that FSDP gathers temporarily, layer by layer.
        copies: of weights in the dtype of the matrix products: those that autocast keeps from forward to backward pass,
            and those of experts, which stay.
        activations: peak of one micro-batch.
        reserved: CUDA's context, workspaces of libraries, temporaries of head and optimizer, fragmentation.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    copies: int = 0
    activations: int = 0
    reserved: int = 0

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def total(self) -> int:
        return self.state + self.copies + self.activations + self.reserved


def training_memory(spec: ModelSpec, optimizer: OptimizerSpec | None = None, layout: Layout | None = None) -> Memory:
    """Memory of a rank between steps, and what it gathers in a step; without a layout, one rank holds everything."""
    layout = layout or Layout()
    everything = parameters(spec)
    optimizer = optimizer or OptimizerSpec()
    weights = FP32_BYTES * sum(layout.held(parameter) for parameter in everything)
    trained = [parameter for parameter in everything if not parameter.frozen]
    assigned = assign([(p.name, p.shape) for p in trained], optimizer, spec)
    gradients = state = whole_state = 0
    for parameter, assignment in zip(trained, assigned, strict=True):
        held = layout.held(parameter)
        held_state = STATE_BYTES[optimizer.state_dtype] * assignment.moments * held
        gradients += FP32_BYTES * held
        # A sharded optimizer divides the rows of replicated tensors; experts that are sharded already stay in place.
        divided = layout.shard_optimizer and not layout.cuts_experts(parameter)
        state += 0 if divided else held_state
        whole_state += held_state if divided else 0
    state += -(-whole_state // layout.world)
    return Memory(weights, gradients, state, _gathered(everything, layout))


def step_memory(spec: TrainSpec, layout: Layout | None = None) -> Memory:
    """Peak memory of one training step on a GPU; `precision.dtype` auto counts as BF16."""
    layout = layout or Layout()
    model, precision = spec.model, counted_precision(spec)
    found = activations(model, spec.tokens.seq_len, spec.runtime.activation_checkpointing, precision)
    # Casts of router and head are temporary; FSDP drops copies with its layers.
    last = head(model)
    linear = [p for p in parameters(model) if p.multiplies and not (p.per_expert or p.whole or p == last)]
    narrow = precision != "fp32" and layout.data == "ddp"
    width = WIDTHS[precision].product
    return replace(
        training_memory(model, spec.optimizer, layout),
        copies=(width * sum(p.count for p in linear) if narrow else 0)
        + (0 if precision == "fp32" else width * _copied(model, layout))
        + _adapted(model, layout, width),
        activations=found.peak * spec.batch.rows * spec.tokens.seq_len,
        reserved=RESERVED_BYTES,
    )


def counted_precision(spec: TrainSpec) -> str:
    """The rung of the ladder for which memory is counted."""
    return "bf16" if spec.precision.dtype == "auto" else spec.precision.dtype


def _copied(model: ModelSpec, layout: Layout) -> int:
    """Elements of this rank's experts that have a copy (trainer/ops/narrow.py): not those with adapters, whose sums are
    made in every pass. Those multiplied in FP8 have none either, but which ones are depends on the GPU."""
    names = {parameter.name for parameter in parameters(model)}
    return sum(
        layout.held(p)
        for p in parameters(model)
        if layout.copied(p) and not (is_adapter(p.name) or f"{p.name}_{DOWN}" in names)
    )


def _adapted(model: ModelSpec, layout: Layout, width: int) -> int:
    """LoRA: the sums of experts and adapter products of one layer and their gradient, in the dtype of matrix products,
    and in FP32 while they are computed (trainer/model/lora.py)."""
    known = {parameter.name: parameter for parameter in parameters(model)}
    layers: dict[str, int] = defaultdict(int)
    for name, parameter in known.items():
        if parameter.per_expert and f"{name}_{DOWN}" in known:
            ranks = layout.expert if layout.cuts_experts(parameter) else 1
            layers[name.rpartition(".")[0]] += parameter.count // ranks
    return (2 * width + FP32_BYTES) * max(layers.values(), default=0)


def _gathered(everything: list[Parameter], layout: Layout) -> int:
    """FSDP: parameters outside layers (embedding, head, MTP's projections) are unsharded during a step, with their
    gradients; of the layers, including MTP's, at most the largest one at a time, with its gradients and the buffer for
    exchanging them. Frozen parameters (LoRA) have no gradient."""
    if layout.data == "ddp":
        return 0
    layers: dict[str, int] = defaultdict(int)
    others = 0
    for parameter in everything:
        if layout.cuts_experts(parameter):
            continue
        if layer := re.match(r"layers\.\d+|mtp\.\d+\.layer", parameter.name):
            layers[layer.group()] += (1 if parameter.frozen else 3) * FP32_BYTES * parameter.count
        else:
            others += (1 if parameter.frozen else 2) * FP32_BYTES * parameter.count
    return others + max(layers.values())


def choose_layout(
    parallel: ParallelSpec,
    model: ModelSpec,
    optimizer: OptimizerSpec,
    world: int,
    ranks_per_node: int,
    device_bytes: float | None,
) -> Layout:
    """The mesh of `parallel` for `world` ranks whose GPUs have `device_bytes` each (None: memory does not matter).

    Raises:
        SpecError: no such mesh exists.
    """

    def fits(layout: Layout) -> bool:
        return device_bytes is None or training_memory(model, optimizer, layout).total <= SHARDED_ABOVE * device_bytes

    return resolve(parallel, model, world, ranks_per_node, fits)


def refuse_too_large(spec: TrainSpec, layout: Layout, rank_bytes: int | None, holder: str = "which") -> None:
    """Refuse a model whose weights, gradients and optimizer state do not fit; activations are only estimates and
    ignored.

    Args:
        rank_bytes: memory of a rank's GPU, or its share of the machine's memory on CPUs; None: unknown.
        holder: the owner of that memory, if ranks differ.

    Raises:
        SpecError: they alone exceed a rank's memory.
    """
    state = training_memory(spec.model, spec.optimizer, layout).state
    if rank_bytes is not None and state > rank_bytes:
        raise SpecError(
            f"model: weights, gradients and optimizer state take {state / 2**30:.1f} GiB on each rank ({layout}), "
            f"{holder} has {rank_bytes / 2**30:.1f}; use more GPUs or more memory, train.parallel.data fsdp, "
            "train.optimizer.state_dtype bf16, or a smaller model"
        )
