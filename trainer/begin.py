"""Load the weights of another model into this one (`train.init_from`); each rank loads only what it holds."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from trainer.agreement import problem
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpointer import load_model, not_finite
from trainer.distributed import World
from trainer.errors import CheckpointError
from trainer.files import checksum
from trainer.hf.files import SINGLE, parts_of
from trainer.hf.weights import read_into
from trainer.kinds.base import Part
from trainer.lora import is_adapter
from trainer.model.hybrid import HybridModel, build_model
from trainer.pretrained import EXPORT, MTP, Pretrained, find, read_json, refuse_misfit
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)


def begin_with(spec: TrainSpec, model: HybridModel, world: World) -> None:
    """A collective of all ranks. Multi-token prediction keeps its random weights if the other model has none.

    Raises:
        SpecError, CheckpointError: the architecture differs, or the files are damaged. All ranks raise.
        DivergedError: a checkpoint's weights are not finite.
    """
    assert spec.init_from is not None
    # The other run may still be training, so all ranks use the checkpoint that is newest for rank 0.
    found = find(world.broadcast(str(find(spec.init_from).folder) if world.is_main else ""))
    refuse_misfit(found, spec.model)
    log.info("beginning with the weights of %s (%s)", found.folder, _named(found))
    if found.kind == "checkpoint":
        checkpoint.verify(found.folder, share=(world.rank, world.size))
    elif found.kind == "export":
        damage = _damage(found) if world.is_main else None  # one rank reads and tells the others
        if damage := world.broadcast(damage):
            raise CheckpointError(damage)
    _fill(found, model, together=True)
    if broken := problem(world, not_finite(_tensors(model))):
        raise CheckpointError(f"{found.folder}: {broken} is not finite; use another model")


def begun_with(spec: TrainSpec, device: torch.device, dtype: torch.dtype | None) -> HybridModel | None:
    """The model that a run started from, whole and in evaluation mode, in one process; None if it no longer exists.

    Args:
        dtype: autocast dtype of matrix products; None without autocast.
    """
    assert spec.init_from is not None
    try:
        found = find(spec.init_from)
        model = build_model(spec.model, spec.backends, device=device, dtype=dtype, seed=None).to_empty(device=device)
        for tensor in _tensors(model).values():
            tensor.detach().zero_()  # parts that the other model lacks, such as MTP, do not affect logits
        _fill(found, model, together=False)
    except (CheckpointError, ValueError, OSError) as error:
        log.warning("the model that the run started from cannot be evaluated: %s", error)
        return None
    return model.eval()


def _fill(found: Pretrained, model: HybridModel, *, together: bool) -> None:
    if found.kind == "checkpoint":
        load_model(found.folder, model, kept=_stays, together=together)
    elif found.kind == "export":
        same = [Part(name, name) for name in model.state_dict() if not is_adapter(name)]
        read_into(found.folder, same, model, ignored=(MTP,), kept=(MTP,))
    else:
        assert found.architecture is not None
        parts, ignored = parts_of(found.architecture, model.spec)
        read_into(found.folder, parts, model, ignored=(*ignored, MTP), kept=(MTP,))


def _stays(name: str) -> bool:
    """Whether a parameter may be missing in the other model."""
    return name.startswith(MTP) or is_adapter(name)


def _named(found: Pretrained) -> str:
    return found.architecture.model_type if found.architecture else found.kind


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _damage(found: Pretrained) -> str | None:
    """What is wrong with the weights of an export."""
    file = found.folder / SINGLE
    written = read_json(found.folder / EXPORT).get("sha256", {}).get(SINGLE)
    if written is None or checksum(file, "sha256") == written:
        return None
    return f"{file} differs from what was written; export the run again"
