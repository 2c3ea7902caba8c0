"""What a spec leaves to memory, decided once by all ranks together: `train.batch.micro_batch_rows: auto`, the largest
micro-batch that fits, and a budget of activation checkpointing (trainer/arithmetic/budget.py).

Rows: by arithmetic for the GPU with the least memory, then by a trial of a micro-batch's forward and backward pass on
every GPU, in which weights, optimizer state and random numbers stay as they are. What is found is kept in the run
directory, for the report, and for the next start on the same number of the same GPUs.

Legend: B rows, T positions.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import agreement
from trainer.arithmetic.budget import within_budget
from trainer.arithmetic.rows import Rows, fitting
from trainer.distributed import World, device_bytes
from trainer.errors import CheckpointError, first_line
from trainer.files import atomic_write
from trainer.model.hybrid import HybridModel
from trainer.optim import Optimizers
from trainer.parallel.layout import Layout
from trainer.precision import Precision
from trainer.process import hostmemory
from trainer.proof.child import is_of_machine
from trainer.recording.results import read_json
from trainer.report.run import ROWS
from trainer.runtimespec import OF_ALL_LAYERS
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)


def decide(spec: TrainSpec, world: World, layout: Layout) -> tuple[TrainSpec, Rows | None]:
    """The spec with a number of rows, and that number with its reason; None if the spec says it. A budget of activation
    checkpointing becomes a number of layers too. Both by the rank with the least memory.

    Raises:
        SpecError: the ranks cannot share a step equally, or a step does not fit in the budget.
    """
    policy = spec.runtime.activation_checkpointing
    if spec.batch.micro_batch_rows != "auto" and policy in OF_ALL_LAYERS:
        return spec, None
    everyone = world.gather((device_bytes(world.device), _name(world.device)))
    least = min((size for size, _ in everyone if size is not None), default=None)
    found = None
    if spec.batch.micro_batch_rows == "auto":
        found = fitting(spec, layout, None if world.device.type == "cpu" else least)
        if world.device.type != "cpu" and (kept := world.broadcast(_kept(spec, world, layout, everyone))) is not None:
            found = Rows(kept, "as an earlier start of the run has found on these GPUs")
        spec = spec.with_rows(found.number)
    share = least or min(world.gather(hostmemory.limit_bytes() // world.local_size))
    spec, said = within_budget(spec, layout, share)
    if said:
        log.info("%s", said)
    return spec, found


def try_out(
    spec: TrainSpec,
    auto: Rows,
    world: World,
    layout: Layout,
    model: HybridModel,
    optimizers: Optimizers,
    precision: Precision,
) -> TrainSpec:
    """On GPUs: the spec with the largest number of rows, at most that of the arithmetic, of which a micro-batch passes.

    A collective of all ranks. Where ranks would wait for each other within a pass (FSDP2, expert parallelism), one that
    runs out of memory would leave the others waiting, so there the arithmetic decides; so it does with FP8 whose scales
    follow from earlier passes.
    """
    rows, why = auto
    stateful = precision.fp8 is not None and (precision.fp8.implementation == "te" or precision.fp8.recipe == "delayed")
    if world.device.type == "cuda" and layout.data == "ddp" and layout.expert == 1 and not stateful:
        choices = [each for each in spec.row_choices(world.size) if each <= rows]
        found = largest(
            choices, lambda each: agreement.problem(world, _passes(spec, each, model, optimizers, precision))
        )
        if found != rows:
            rows, why = found, f"{rows} by arithmetic, but a trial ran out of memory"
    if world.is_main:
        keep(spec, world, layout, rows, why)
    log.info("train.batch.micro_batch_rows auto: %d (%s)", rows, why)
    return spec.with_rows(rows)


def largest(choices: list[int], problem: Callable[[int], str | None]) -> int:
    """The largest number without a problem, from the largest down; the smallest is not tried, as there is no other."""
    return next((rows for rows in reversed(choices[1:]) if problem(rows) is None), choices[0])


def _passes(spec: TrainSpec, rows: int, model: HybridModel, optimizers: Optimizers, precision: Precision) -> str | None:
    """Why a micro-batch of so many of the longest rows does not pass; None if it does.

    It passes twice, since all but the first of a step find the gradients of those before.
    """
    device = next(model.parameters()).device
    shape = rows * spec.tokens.seq_len // max(spec.tokens.seq_lens), max(spec.tokens.seq_lens)
    try:
        for _ in range(2):
            _pass(shape, model, precision)
        return None
    except RuntimeError as error:
        if not is_of_machine(error):
            raise
        return first_line(error)
    finally:
        optimizers.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _pass(shape: tuple[int, int], model: HybridModel, precision: Precision) -> None:
    """Forward and backward of one micro-batch; its gradients are all 0."""
    device = next(model.parameters()).device
    ids_BT = torch.arange(shape[0] * shape[1], device=device).view(shape) % model.spec.vocab_size
    documents_BT = torch.zeros(shape, dtype=torch.int32, device=device)
    with precision.autocast(device.type):
        output = model(ids_BT, documents_BT, ids_BT, shape[0])
    (output.ce_sum + output.mtp_ce_sum_K.sum() + output.aux_sum).mul(0.0).backward()


def keep(spec: TrainSpec, world: World, layout: Layout, rows: int, why: str) -> None:
    """Write the record of what was found."""
    own = _known_by(spec, world, layout, device_bytes(world.device), _name(world.device))
    atomic_write(Path(spec.run_dir) / ROWS, json.dumps({"rows": rows, "why": why, **own}, indent=1).encode())


def _kept(spec: TrainSpec, world: World, layout: Layout, everyone: list[tuple[int | None, str]]) -> int | None:
    """The rows in the record, if it is of as many ranks with GPUs like these, which share and recompute alike."""
    try:
        value = read_json(Path(spec.run_dir) / ROWS, ("rows",)) or {}
    except CheckpointError:  # damaged: found again
        return None
    same = all(known.items() <= value.items() for known in (_known_by(spec, world, layout, *each) for each in everyone))
    return value["rows"] if same and value.get("rows") in spec.row_choices(world.size) else None


def _known_by(spec: TrainSpec, world: World, layout: Layout, size: int | None, name: str) -> dict[str, Any]:
    """All that decides how many rows fit, besides the model."""
    setting = {"layout": str(layout), "recomputed": str(spec.runtime.activation_checkpointing)}
    return {"ranks": world.size, "bytes": size, "gpu": name, **setting, "precision": spec.precision.dtype}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
