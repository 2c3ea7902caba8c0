"""FP8 through Transformer Engine: its Linear in place of ours, its recipe around the forward pass.

The package is imported only if it is selected or proven. Its modules need a GPU; recipes and signatures do not.
Differences from `linear.py`: amaxes enter the history at every forward pass (every micro-batch), and the first one is
scaled by 1. Recomputation under activation checkpointing would see scales that have moved on, and torch.compile cannot
trace that recipe: `check_runtime` refuses both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import SpecError
from trainer.ops import packages
from trainer.runtimespec import RuntimeSpec
from trainer.spec import Fp8Spec

PACKAGE = "transformer_engine.pytorch"
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_TENSORS = ("amax_history", "scale")


def package() -> ModuleType:
    """The imported package.

    Raises:
        SpecError: it is missing or broken, in one line.
    """
    found = packages.load(PACKAGE)
    if isinstance(found, str):
        raise SpecError(f"train.precision.fp8.implementation te: {found}; write torch, or use an image with it")
    return found


def problem(fp8: Fp8Spec, capability: tuple[int, int] | None) -> str | None:
    """Why Transformer Engine cannot run this recipe here; None if it can. Imports it only on a suitable GPU."""
    if fp8.margin and fp8.recipe == "current":
        return f"it takes no margin for current scaling (train.precision.fp8.margin {fp8.margin})"
    if capability is None:
        return "there is no GPU"
    needed = (9, 0) if fp8.recipe == "block128" else (8, 9)
    if capability < needed:
        have = f"{capability[0]}.{capability[1]}"
        return f"this GPU has compute capability {have}, FP8 by {fp8.recipe} scaling needs {needed[0]}.{needed[1]}"
    return packages.problem(packages.load(PACKAGE))


def check_runtime(fp8: Fp8Spec, runtime: RuntimeSpec) -> None:
    """Refuse settings that its delayed recipe does not support.

    Raises:
        SpecError: CUDA graphs, or the delayed recipe together with torch.compile or with recomputed activations.
    """
    if fp8.implementation != "te":
        return
    if runtime.graphs is True:
        raise SpecError(
            "train.runtime.graphs does not go with Transformer Engine, which keeps a part of its state on the host; "
            "write auto, or train.precision.fp8.implementation torch"
        )
    if fp8.recipe != "delayed":
        return
    for name, on in (
        ("compile", runtime.compile is True),
        ("activation_checkpointing", runtime.activation_checkpointing != "none"),
    ):
        if on:
            raise SpecError(
                f"train.runtime.{name} does not go with delayed FP8 scaling by Transformer Engine; write "
                "train.precision.fp8.recipe current, or train.precision.fp8.implementation torch"
            )


def compile_problem(fp8: Fp8Spec) -> str | None:
    """Why layers cannot be compiled under this recipe; None if they can."""
    if fp8.implementation == "te" and fp8.recipe == "delayed":
        return "torch.compile cannot trace delayed FP8 scaling by Transformer Engine"
    return None


def recipe(fp8: Fp8Spec) -> Any:
    """Transformer Engine's recipe object for ours."""
    package()
    from transformer_engine.common import recipe as recipes

    form = recipes.Format.HYBRID if fp8.hybrid else recipes.Format.E4M3
    if fp8.recipe == "delayed":
        return recipes.DelayedScaling(margin=fp8.margin, fp8_format=form, amax_history_len=fp8.amax_history_steps)
    kind = recipes.Float8BlockScaling if fp8.recipe == "block128" else recipes.Float8CurrentScaling
    return kind(fp8_format=form)


def autocast(fp8: Fp8Spec) -> AbstractContextManager:
    """The context of forward passes; releases before 2.9 know it as fp8_autocast."""
    te = package()
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe(fp8))
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe(fp8))


def convert(model: nn.Module, weights: list[str], fp8: Fp8Spec) -> TeState:
    """Make te.Linear out of the owners of these weights; parameters and modules stay the same objects.

    Modules are converted in place, because FSDP2 puts gathered weights into the modules it was given.
    """
    te = package()
    modules = {}
    for name in weights:
        place = name.removesuffix(".weight")
        linear = model.get_submodule(place)
        assert isinstance(linear, nn.Linear), name
        weight, bias, shape = linear.weight, linear.bias, (linear.in_features, linear.out_features)
        linear.__class__ = te.Linear
        te.Linear.__init__(linear, *shape, bias=bias is not None, params_dtype=weight.dtype, device="meta")
        linear.weight = weight
        if bias is not None:
            linear.bias = bias
        # Its own state is a pickle, which our checkpoints do not take: TeState saves the tensors in it.
        linear.register_state_dict_post_hook(_without_extra_state)
        modules[place] = linear
    return TeState(modules, fp8)


def _without_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


class TeState:
    """The interface of `Fp8State` over the amax histories that Transformer Engine keeps in its modules."""

    def __init__(self, modules: dict[str, Any], fp8: Fp8Spec) -> None:
        self._modules = modules if fp8.recipe == "delayed" else {}
        made = recipe(fp8)
        for module in self._modules.values():  # they would make their tensors at the first step, after the resume
            module.fp8_meta["num_gemms"] = 1
            module.fp8_meta["recipe"] = made
            module.init_fp8_meta_tensors(made)

    def finish_step(self) -> None:
        """Nothing: the end of each forward pass and of its backward pass have done it."""

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{place}.{direction}.{name}": getattr(module.fp8_meta[direction], name)
            for place, module in self._modules.items()
            for direction in _DIRECTIONS
            for name in _TENSORS
        }

    counted_tensors = 0  # Transformer Engine does not tell overflows

    def figures(self) -> tuple[dict[str, float], float]:
        """Largest of the newest amaxes by operand; only the delayed recipe keeps any, and nothing counts overflows."""
        if not self._modules:
            return {}, 0.0
        metas = [module.fp8_meta for module in self._modules.values()]
        forward_X = torch.stack([meta["scaling_fwd"].amax_history[-1] for meta in metas]).amax(0)
        backward_X = torch.stack([meta["scaling_bwd"].amax_history[-1] for meta in metas]).amax(0)
        values = torch.stack([forward_X[0], forward_X[1], backward_X[0]]).tolist()
        return dict(zip(("input", "weight", "gradient"), values, strict=True)), 0.0
