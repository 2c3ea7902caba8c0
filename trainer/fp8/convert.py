"""Puts FP8 products into a built model, module by module, in place: no parameter changes its name, dtype or storage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trainer import parity
from trainer.errors import SpecError
from trainer.fp8 import te
from trainer.fp8.experts import Fp8Grouped, experts_fp8, experts_problem
from trainer.fp8.head import Fp8HeadProducts
from trainer.fp8.linear import Fp8Linear, Recipe
from trainer.fp8.scaling import E4M3, E5M2
from trainer.fp8.state import Fp8State
from trainer.fp8.table import HEAD, Conversion, conversion_table, share, summary
from trainer.model.hybrid import HybridModel
from trainer.model.moe import Moe
from trainer.modelspec import ModelSpec
from trainer.ops import Setting
from trainer.spec import Fp8Spec

log = logging.getLogger(__name__)


def recipe_of(fp8: Fp8Spec) -> Recipe:
    """The recipe with its implementation; `auto` must have been resolved (trainer.precision)."""
    assert fp8.implementation != "auto"
    gradient = E5M2 if fp8.hybrid else E4M3
    return Recipe(fp8.recipe, E4M3, gradient, fp8.margin, fp8.implementation)


def convert(
    model: HybridModel,
    spec: ModelSpec,
    fp8: Fp8Spec,
    device: torch.device,
    *,
    only_proven: bool = False,
    agree: Callable[[str | None], str | None] = lambda problem: problem,
) -> Fp8State | te.TeState:
    """Convert the modules in the table, log the table, and return the state of all products.

    Args:
        only_proven: see `why_not_experts`.
        agree: combines the ranks' reasons against FP8 experts into one.

    Raises:
        SpecError: nothing in this model can be converted.
    """
    table = conversion_table(spec, fp8, agree(why_not_experts(model, fp8, device, only_proven=only_proven)))
    chosen = [row for row in table if row.converted]
    if not chosen:
        reasons = "; ".join(sorted({row.reason for row in table if row.active}))
        raise SpecError(f"train.precision.dtype fp8: no product of this model can be FP8 ({reasons}); write bf16")
    done = f"{share(table):.0%} of the products' operations"
    log.info("fp8: %s scaling, %s: %s", fp8.recipe, fp8.implementation, done)
    for line in summary(table):
        log.info("fp8: %s", line)
    return put(model, chosen, fp8, device)


def why_not_experts(model: HybridModel, fp8: Fp8Spec, device: torch.device, *, only_proven: bool) -> str | None:
    """Why the experts' products are not FP8 here; None if they are.

    Args:
        only_proven: the implementation was chosen by its parity record, so the experts' products need theirs too.
    """
    recipe = recipe_of(fp8)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if problem := experts_problem(recipe, model.choices["experts"].name, capability):
        return problem
    version, where = parity.package_version("torch"), Setting(device).device_class
    if only_proven and not parity.proven("fp8_experts", recipe.implementation, recipe.scaling, where, version):
        return f"grouped FP8 products of torch {version} are unproven on {where}"
    return None


def put(model: HybridModel, rows: list[Conversion], fp8: Fp8Spec, device: torch.device) -> Fp8State | te.TeState:
    """Replace the products of these weights by FP8 products; returns their state."""
    recipe = recipe_of(fp8)
    if recipe.implementation == "te":
        return te.convert(model, [row.name for row in rows], fp8)
    state = Fp8State(len(rows), recipe, fp8.amax_history_steps, device)
    grouped: dict[str, dict[str, Fp8Grouped]] = {}
    for index, row in enumerate(rows):
        place, _, leaf = row.name.rpartition(".")
        module = model.get_submodule(place)
        if len(row.shape) == 3:  # the experts'
            grouped.setdefault(place, {})[leaf] = Fp8Grouped(recipe, state.slots(index), module)
            continue
        assert isinstance(module, nn.Linear), row.name
        if row.name == HEAD:  # of which only the cross-entropy is FP8; evaluation and generation take the weight
            model.fp8_head = partial(Fp8HeadProducts, recipe=recipe, slots=state.slots(index))
            continue
        module.__class__ = Fp8Linear
        module.recipe, module.slots = recipe, state.slots(index)
    for place, products in grouped.items():
        moe = model.get_submodule(place)
        assert isinstance(moe, Moe)
        moe.run_experts = partial(experts_fp8, up=products[moe.spec.first], down=products["down_EDF"])
    return state
