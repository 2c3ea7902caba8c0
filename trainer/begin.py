"""Fill a new run's model with the weights of another one (`train.init_from`), each rank with what it holds."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from trainer.agreement import problem
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpointer import load_model, not_finite
from trainer.distributed import World
from trainer.errors import CheckpointError
from trainer.files import checksum
from trainer.hf.weights import SINGLE, parts_of, read_into
from trainer.kinds.base import Part
from trainer.model.hybrid import HybridModel
from trainer.pretrained import EXPORT, Pretrained, find, read_json, refuse_misfit
from trainer.spec import TrainSpec

MTP = "mtp."

log = logging.getLogger(__name__)


def begin_with(spec: TrainSpec, model: HybridModel, world: World) -> None:
    """A collective of all ranks. Multi-token prediction stays as drawn where the other model has none.

    Raises:
        SpecError, CheckpointError: it is another model, or damaged. All ranks raise.
        DivergedError: a checkpoint's weights are not finite.
    """
    assert spec.init_from is not None
    # Another run may go on meanwhile: its newest checkpoint is the one that rank 0 sees.
    found = find(world.broadcast(str(find(spec.init_from).folder) if world.is_main else ""))
    refuse_misfit(found, spec.model)
    log.info("beginning with the weights of %s (%s)", found.folder, _named(found))
    if found.kind == "checkpoint":
        checkpoint.verify(found.folder, share=(world.rank, world.size))
        load_model(found.folder, model, kept=MTP, together=True)
    elif found.kind == "export":
        _verify_export(found.folder, world)
        read_into(found.folder, _same_names(model), model, ignored=(MTP,), kept=(MTP,))
    else:
        assert found.architecture is not None
        parts, ignored = parts_of(found.architecture, spec.model)
        read_into(found.folder, parts, model, ignored=(*ignored, MTP), kept=(MTP,))
    if broken := problem(world, not_finite(_tensors(model))):
        raise CheckpointError(f"{found.folder}: {broken} is not finite; give another model")


def _named(found: Pretrained) -> str:
    return found.architecture.model_type if found.architecture else found.kind


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _same_names(model: nn.Module) -> list[Part]:
    """Of an export of ours, whose names are those of the model."""
    return [Part(name, name) for name in model.state_dict()]


def _verify_export(folder: Path, world: World) -> None:
    """Compare the weights with what was written: one rank reads, all get to know."""
    damage = None
    if world.is_main:
        written = read_json(folder / EXPORT).get("sha256", {}).get(SINGLE)
        if written is not None and checksum(folder / SINGLE, "sha256") != written:
            damage = f"{folder / SINGLE} differs from what was written; export the run again"
    if damage := world.broadcast(damage):
        raise CheckpointError(damage)
