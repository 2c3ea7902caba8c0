"""Compare FP8 implementations with the emulation on this device; the results are parity records.

`linear` is one layer, `fp8_experts` the grouped product; the variant is the recipe. Both sides get the same operands.
torch's products must agree with the emulation except for the rounding of BF16 results and fast sums. Transformer Engine
has its own cast kernels, and grouped weight gradients are BF16 on one side: there the tolerance is that of FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.fp8 import te
from trainer.fp8.convert import recipe_of
from trainer.fp8.experts import Fp8Grouped, experts_problem
from trainer.fp8.gemm import torch_problem
from trainer.fp8.linear import Fp8Linear
from trainer.fp8.state import Fp8State
from trainer.ops import Setting
from trainer.ops.check import device_name, difference, worst
from trainer.parity import Record, package_version
from trainer.spec import Fp8Spec

OPERATIONS = ("linear", "fp8_experts")
CLOSE, FP8_ROUNDING = 1e-2, 6e-2
SHAPES = ((512, 2048, 1280), (100, 256, 128), (1024, 128, 2048))  # tokens, inputs, outputs
TE_TOKENS = 8  # Transformer Engine accepts only multiples of this number of tokens
PASSES = 3  # so that delayed scales come from a history, of the same numbers


def comparisons(op: str) -> Iterator[tuple[str, Fp8Spec]]:
    """Implementation and options of every combination that could exist."""
    for implementation in ("torch", "te") if op == "linear" else ("torch",):
        for recipe in ("delayed", "current", "block128"):
            form: Literal["auto", "e4m3"] = "auto" if op == "linear" else "e4m3"
            yield implementation, Fp8Spec(recipe=recipe, format=form, implementation=implementation)


def problem(op: str, fp8: Fp8Spec, device: torch.device) -> str | None:
    """Why a combination cannot run on this device; None if it can."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if fp8.implementation == "te":
        return te.problem(fp8, capability)
    recipe = recipe_of(fp8)
    found = torch_problem(fp8.recipe, recipe.gradient, capability)
    return found or (experts_problem(recipe, "grouped", capability) if op == "fp8_experts" else None)


def shapes(fp8: Fp8Spec) -> list[tuple[int, int, int]]:
    """The SHAPES that an implementation accepts."""
    return [shape for shape in SHAPES if fp8.implementation != "te" or shape[0] % TE_TOKENS == 0]


def compare(op: str, fp8: Fp8Spec, device: torch.device) -> Record:
    """Outputs and gradients of one implementation against the emulation, over all shapes."""
    run = _linear if op == "linear" else _experts
    emulation = fp8.updated({"implementation": "emulated"})
    forward = backward = 0.0
    for shape in shapes(fp8):
        found, expected = (run(options, shape, device) for options in (fp8, emulation))
        errors = [difference(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
        forward, backward = worst(forward, errors[0]), worst(backward, *errors[1:])
    package = "transformer_engine" if fp8.implementation == "te" else "torch"
    tolerance = CLOSE if op == "linear" and package == "torch" else FP8_ROUNDING
    return Record(
        op=op,
        backend=fp8.implementation,
        variant=fp8.recipe,
        package=package,
        version=package_version(package) or "unknown",
        torch=package_version("torch") or "unknown",
        device_class=Setting(device).device_class,
        device=device_name(device),
        forward_error=float(f"{forward:.2e}"),
        backward_error=float(f"{backward:.2e}"),
        leak=0.0,
        tolerance=tolerance,
        passed=forward <= tolerance and backward <= tolerance,
    )


def _draw(device: torch.device, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _linear(fp8: Fp8Spec, shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """Output, gradient of the input and of the weight in the last pass."""
    tokens, inputs, outputs = shape
    holder = nn.Module()
    holder.layer = nn.Linear(inputs, outputs, bias=False, device=device)
    with torch.no_grad():
        holder.layer.weight.copy_(_draw(device, outputs, inputs, seed=1) * inputs**-0.5)
    state: te.TeState | Fp8State
    if fp8.implementation == "te":
        state = te.convert(holder, ["layer.weight"], fp8)
    else:
        state = Fp8State(1, recipe_of(fp8), fp8.amax_history_steps, device)
        holder.layer.__class__ = Fp8Linear
        holder.layer.recipe, holder.layer.slots = recipe_of(fp8), state.slots(0)
    g = _draw(device, tokens, outputs, seed=3).bfloat16() * 1e-3
    for _ in range(PASSES):
        x = _draw(device, tokens, inputs, seed=2).bfloat16().requires_grad_()
        holder.zero_grad()
        y = _call(holder.layer, x, fp8)
        y.backward(g)
        state.finish_step()
    return [y.detach().float(), x.grad.float() * 1e3, holder.layer.weight.grad.float() * 1e3]


def _call(layer: nn.Module, x: Tensor, fp8: Fp8Spec) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        if fp8.implementation != "te":
            return layer(x)
        with te.autocast(fp8):
            return layer(x)


def _experts(fp8: Fp8Spec, shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """Four experts: one without a token, one with few."""
    tokens, inputs, outputs = shape
    state = Fp8State(1, recipe_of(fp8), fp8.amax_history_steps, device)
    product = Fp8Grouped(recipe_of(fp8), state.slots(0), nn.Module())
    ends_E = torch.tensor([tokens // 2, tokens // 2, tokens // 2 + 5, tokens], dtype=torch.int32, device=device)
    g = _draw(device, tokens, outputs, seed=3).bfloat16() * 1e-3
    for _ in range(PASSES):
        x = _draw(device, tokens, inputs, seed=2).bfloat16().requires_grad_()
        w = (_draw(device, 4, outputs, inputs, seed=1) * inputs**-0.5).requires_grad_()
        y = product(x, w, ends_E)
        y.backward(g)
        state.finish_step()
    return [y.detach().float(), x.grad.float() * 1e3, w.grad.float() * 1e3]
