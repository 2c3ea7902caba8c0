"""Bytes that training keeps on each rank, by arithmetic; activations come on top. Imports no torch.

Weights and gradients are FP32, whatever precision the matrix products have; optimizer state is what its spec says.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from trainer.flops import Parameter, parameters
from trainer.modelspec import ModelSpec
from trainer.optim.rules import STATE_BYTES, assign
from trainer.parallel.layout import Layout, is_expert_weight, resolve
from trainer.spec import OptimizerSpec, ParallelSpec

FP32_BYTES = 4
SHARDED_ABOVE = 0.5  # of a GPU's memory: where ddp's state leaves less than half for activations, auto takes fsdp


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank; `gathered` is what FSDP puts together for a moment, layer by layer."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def training_memory(spec: ModelSpec, optimizer: OptimizerSpec | None = None, layout: Layout | None = None) -> Memory:
    """What a rank holds between two steps, and what it gathers in them; without a layout, one rank holds everything."""
    layout = layout or Layout()
    everything = parameters(spec)
    optimizer = optimizer or OptimizerSpec()
    assigned = assign([(p.name, p.shape) for p in everything], optimizer, spec)
    weights = state = whole_state = 0
    for parameter, assignment in zip(everything, assigned, strict=True):
        held = layout.held(parameter.name, parameter.shape)
        held_state = STATE_BYTES[optimizer.state_dtype] * assignment.moments * held
        weights += FP32_BYTES * held
        # A sharded optimizer divides the rows of whole tensors; experts that are cut already stay where they are.
        divided = layout.shard_optimizer and not (layout.expert > 1 and is_expert_weight(parameter.name))
        state += 0 if divided else held_state
        whole_state += held_state if divided else 0
    state += -(-whole_state // layout.world)
    return Memory(weights, weights, state, _gathered(everything, layout))


def _gathered(everything: list[Parameter], layout: Layout) -> int:
    """FSDP: embedding, norms and head stay whole during a step, with their gradients; of the layers, the largest at a
    time, with its gradients and the buffer that they are exchanged in."""
    if layout.data == "ddp":
        return 0
    by_layer: dict[str, int] = defaultdict(int)
    for parameter in everything:
        if layout.expert == 1 or not is_expert_weight(parameter.name):
            by_layer[".".join(parameter.name.split(".")[:2])] += FP32_BYTES * parameter.count
    layers = [size for name, size in by_layer.items() if name.startswith("layers.")]
    others = sum(size for name, size in by_layer.items() if not name.startswith("layers."))
    return 2 * others + 3 * max(layers, default=0)


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
        ValueError: no such mesh exists.
    """

    def fits(layout: Layout) -> bool:
        return device_bytes is None or training_memory(model, optimizer, layout).total <= SHARDED_ABOVE * device_bytes

    return resolve(parallel, model, world, ranks_per_node, fits)
