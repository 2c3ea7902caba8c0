"""Whether a run launches its layers as CUDA graphs: each kind of layer is first recorded alone and compared.

A recording may miss what only the host does, and then it repeats numbers of the first pass. So each kind of layer, as a
small model of one layer (see `trainer.compiled`), goes through two passes with other documents and other weights.

With `runtime.graphs: auto` the trial does that, which also times them and survives what ends a process
(trainer/proof/trial.py); so without a trial there are no graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from trainer import compiled
from trainer.compiled import Kind, furthest, gradients, leaving_nothing, micro_batch
from trainer.distributed import World
from trainer.errors import SpecError
from trainer.model.compiling import compile_layers
from trainer.model.graphs import LayerGraphs, Recorder
from trainer.model.hybrid import HybridModel
from trainer.ops import Choice
from trainer.parallel.mesh import Mesh
from trainer.precision import Precision
from trainer.runtimespec import Recomputing
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

TOLERANCE = 1e-2  # of each gradient: the kernels are the same, but some add in any order; what is stale or lost gives 1
MOVED = 1.05  # by what weights are multiplied between the passes


def demanded(
    spec: TrainSpec, world: World, mesh: Mesh, chosen: Precision, choices: dict[str, Choice], *, compiles: bool
) -> bool:
    """Whether the spec demands graphs, which are then right here.

    Raises:
        SpecError: they are not possible, or compute something else.
    """
    if spec.runtime.graphs is not True:
        return False
    compared = compiled.kinds(spec.model, chosen, spec.runtime.activation_checkpointing)
    found = why_not(world, chosen, spec.runtime.activation_checkpointing)
    for kind in compared:
        if found is not None:
            break
        with leaving_nothing(world.device):
            model = compiled.build(kind, spec, world.device, mesh, chosen, choices)
            if compiles:
                compile_layers(model)
            found = problem(model, kind, spec, chosen)
    if found is not None:
        raise SpecError(f"train.runtime.graphs: {found}; write false, or auto to use graphs only where that is right")
    log.info("layers are launched as CUDA graphs; %s computed as without", ", ".join(map(str, compared)))
    return True


def why_not(world: World, chosen: Precision, policy: Recomputing) -> str | None:
    """What rules graphs out before anything is tried; the same on all ranks."""
    if world.device.type != "cuda":
        return "they need a GPU"
    if world.size > 1:
        return "ranks wait for each other's gradients one by one, and graphs add them up by themselves"
    if policy == "sqrt":
        return "groups of layers are recomputed (activation_checkpointing sqrt), and each layer has its own recordings"
    if chosen.fp8 and chosen.fp8.implementation == "te":
        return "Transformer Engine keeps a part of its state on the host"
    return None


def problem(
    model: HybridModel,
    kind: Kind,
    spec: TrainSpec,
    chosen: Precision,
    recorder: Callable[[torch.device], Recorder] | None = None,
) -> str | None:
    """The problem of the graphs of a kind of layer, else None, and then the model keeps them.

    Args:
        model: as `compiled.build` has made it of this kind; its weights change.
        recorder: see `LayerGraphs`.
    """
    told: list[str] = []
    graphs, device = LayerGraphs(model, told.append, recorder), model.final_norm.weight.device
    for rows, length in compiled.shapes(spec.tokens, spec.batch):
        for seed in range(2):
            batch = micro_batch(model.spec.vocab_size, rows, length, device, seed)
            _move_weights(model)
            model.graphs = None
            expected = gradients(model, batch, chosen)
            model.graphs = graphs
            name, difference = furthest(gradients(model, batch, chosen), expected)
            if told:
                return f"layer {kind} cannot be recorded ({told[0]})"
            if not difference <= TOLERANCE:
                return f"layer {kind} recorded computes something else: {name} is off by {difference:.1%}"
    return None


@torch.no_grad()
def _move_weights(model: HybridModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(MOVED)
