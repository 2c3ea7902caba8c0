"""Resolve `auto` settings identically on all ranks, from the weakest rank.

Ranks may differ: an older GPU, less memory, a package that only one image has. Each sends its capabilities to the
others; then all derive the same result, or the same error, from the same list. Every function is a collective of all
ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from trainer import ops, precision
from trainer.arithmetic.memory import choose_layout, refuse_too_large
from trainer.distributed import World, device_bytes
from trainer.errors import SpecError
from trainer.ops import Choice, Setting, Verdict
from trainer.parallel.layout import Layout
from trainer.precision import Precision
from trainer.preflight.ranks import Place
from trainer.process import hostmemory
from trainer.process.failures import node_name
from trainer.spec import TrainSpec

T = TypeVar("T")
GIB = 2**30


def problem(world: World, own: str | None) -> str | None:
    """The first problem of any rank, None if there is none; the rank is named unless all have the same problem."""
    return _common(_told(world, own))


def layout(spec: TrainSpec, world: World) -> tuple[Layout, str]:
    """The mesh, by the memory of the rank that has the least, and a note about that rank if ranks differ (else "").

    Raises:
        SpecError: no such mesh exists, or the model is too large for that rank.
    """
    gpu_bytes = device_bytes(world.device)
    own = gpu_bytes or hostmemory.limit_bytes() // world.local_size
    told = _told(world, (own, gpu_bytes is not None, world.local_size))
    place, (least, on_gpu, local_size) = min(told, key=lambda entry: entry[1][0])
    most = max(have for _, (have, _, _) in told)
    per_node = local_size if len({size for _, (_, _, size) in told}) == 1 else 1
    chosen = choose_layout(spec.parallel, spec.model, spec.optimizer, world.size, per_node, least if on_gpu else None)
    holder = "which" if least == most else str(place)
    refuse_too_large(spec, chosen, least, holder)
    why = f"by the memory of {place}, {least / GIB:.1f} GiB; others have up to {most / GIB:.1f}"
    return chosen, why if least < most else ""


def rung(spec: TrainSpec, world: World) -> Precision:
    """The highest precision that all ranks support.

    Raises:
        SpecError: a rank cannot run a dtype or FP8 implementation that the spec names.
    """
    own = precision.device_capability(world.device)
    own_problems = precision.fp8_problems(spec.precision, own)
    if spec.model.lora:
        own_problems = dict.fromkeys(own_problems, "does not support adapters (train.model.lora)")
    told = _told(world, (own, own_problems))
    place, (weakest, _) = min(told, key=lambda entry: entry[1][0] or (0, 0))
    best = max(capability or (0, 0) for _, (capability, _) in told)
    names = dict.fromkeys(name for _, (_, problems) in told for name in problems)
    problems = {name: _common((at, problems.get(name)) for at, (_, problems) in told) for name in names}
    differ = weakest is not None and weakest < best
    chosen = precision.resolve(spec.precision, weakest, problems, gpu=f"the GPU of {place}" if differ else "this GPU")
    if not differ:
        return chosen
    others = f"{best[0]}.{best[1]}"
    return replace(chosen, reason=f"{chosen.reason}; decided by {place}, others have up to {others}")


def backends(spec: TrainSpec, world: World, dtype: torch.dtype | None) -> dict[str, Choice]:
    """The backend of each operation: the fastest that every rank can run, proven on every rank or else portable.

    Args:
        dtype: dtype of autocast; None without it.

    Raises:
        SpecError: a backend that the spec names cannot run on some rank.
    """
    setting = Setting(world.device, dtype or torch.float32, spec.model)
    own: dict[str, Choice] = {}
    refusal = None
    try:
        own = ops.resolve(spec.backends, setting.device, setting.dtype, spec.model)
    except SpecError as error:
        refusal = str(error)
    if refused := problem(world, refusal):
        raise SpecError(refused)
    told = _told(world, own)
    agreed = {}
    for op in own:
        choices = [choices[op] for _, choices in told]
        if len({choice.name for choice in choices}) == 1:
            agreed[op] = next((choice for choice in choices if not choice.proven), choices[0])
            continue
        surveys = _told(world, ops.survey(op, setting))
        agreed[op] = ops.best(op, setting.device, partial(_weakest, surveys=surveys))
    return agreed


def _weakest(name: str, surveys: list[tuple[Place, dict[str, Verdict]]]) -> Verdict:
    """The combined verdict of all ranks on a backend."""
    told = [(place, verdicts[name]) for place, verdicts in surveys]
    return Verdict(*(_common((place, verdict[field]) for place, verdict in told) for field in range(2)))


def _told(world: World, own: T) -> list[tuple[Place, T]]:
    return world.gather((Place(world.rank, node_name()), own))


def _common(told: Iterable[tuple[Place, str | None]]) -> str | None:
    told = list(told)
    found = [(place, text) for place, text in told if text is not None]
    if not found:
        return None
    place, text = found[0]
    return text if len({text for _, text in told}) == 1 else f"{text} (so says {place})"
