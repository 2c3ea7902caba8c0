"""Whether a run launches its layers as CUDA graphs: each kind of layer is first recorded alone and compared.

A recording may miss what only the host does, and then it repeats numbers of the first pass. So each kind of layer, as a
small model of one layer (see `trainer.compiled`), goes through two passes with other documents and other weights.
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
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

TOLERANCE = 1e-2  # of each gradient: the kernels are the same, but some add in any order; what is stale or lost gives 1
MOVED = 1.05  # by what weights are multiplied between the passes


def agreed(
    spec: TrainSpec, world: World, mesh: Mesh, chosen: Precision, choices: dict[str, Choice], *, compiles: bool
) -> bool:
    """Whether to launch layers as graphs; all ranks get the same answer.

    Raises:
        SpecError: the spec demands it, but it is not possible here, or graphs compute something else.
    """
    wanted = spec.runtime.graphs
    if wanted is False:
        return False
    compared = compiled.kinds(spec.model, chosen)
    found = why_not(world, chosen)
    level = logging.INFO if found else logging.WARNING
    for kind in compared:
        if found is None:
            found = problem(kind, spec, world.device, mesh, chosen, choices, compiles=compiles)
    if found is None:
        log.info("layers are launched as CUDA graphs; %s computed as without", ", ".join(map(str, compared)))
        return True
    if wanted is True:
        raise SpecError(f"train.runtime.graphs: {found}; write false, or auto to use graphs only where that is right")
    log.log(level, "layers are launched kernel by kernel, not as CUDA graphs: %s", found)
    return False


def why_not(world: World, chosen: Precision) -> str | None:
    """What rules graphs out before anything is tried; the same on all ranks."""
    if world.device.type != "cuda":
        return "they need a GPU"
    if world.size > 1:
        return "ranks wait for each other's gradients one by one, and graphs add them up by themselves"
    return None if fits(chosen) else "Transformer Engine keeps a part of its state on the host"


def fits(chosen: Precision) -> bool:
    """Whether products in this precision can be recorded."""
    return chosen.fp8 is None or chosen.fp8.implementation != "te"


def problem(
    kind: Kind,
    spec: TrainSpec,
    device: torch.device,
    mesh: Mesh,
    chosen: Precision,
    choices: dict[str, Choice],
    *,
    compiles: bool,
    recorder: Callable[[torch.device], Recorder] | None = None,
) -> str | None:
    """The problem of the graphs of a kind of layer, else None.

    Args:
        recorder: see `LayerGraphs`.
    """
    with leaving_nothing(device):
        model = compiled.build(kind, spec, device, mesh, chosen, choices)
        if compiles:
            compile_layers(model)
        told: list[str] = []
        graphs = LayerGraphs(model, told.append, recorder)
        for rows, length in compiled.shapes(spec.tokens, spec.batch):
            for seed in range(2):
                batch = micro_batch(model.spec.vocab_size, rows, length, device, seed)
                _multiply_weights(model)
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
def _multiply_weights(model: HybridModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(MOVED)
