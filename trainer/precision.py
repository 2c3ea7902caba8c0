"""Precision ladder: FP8 (compute capability 8.9) → BF16 (8.0) → FP16 with dynamic loss scaling → FP32 (CPU).

Weights and gradients are FP32 on every rung; the rungs differ in the autocast dtype of matrix products and, for FP8, in
the products of the converted modules (trainer.fp8). `auto` uses FP8 only with an implementation that a parity record
(committed, or made at the start) proves for its version and this class of GPU; the spec may name any that can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from trainer import parity
from trainer.errors import SpecError
from trainer.fp8 import te
from trainer.fp8.gemm import torch_problem
from trainer.fp8.scaling import E4M3, E5M2
from trainer.spec import Fp8Spec, PrecisionSpec

Capability = tuple[int, int]

FP8_CAPABILITY: Capability = (8, 9)
BF16_CAPABILITY: Capability = (8, 0)
# What `auto` converts beside the projections: narrower experts spend more time on casts than they save.
OF_AUTO = {"head": True, "experts_from": 512}
PACKAGES = {"te": "transformer_engine", "torch": "torch"}  # in order of preference


@dataclass(frozen=True)
class Precision:
    """One rung.

    Attributes:
        name: "fp8", "bf16", "fp16" or "fp32".
        autocast_dtype: dtype of matrix products under autocast; None without autocast.
        loss_scaling: whether gradients would underflow without it (FP16 has 5 exponent bits).
        reason: why this rung, for the log.
        fp8: recipe and resolved implementation of the converted products; None on other rungs.
    """

    name: str
    autocast_dtype: torch.dtype | None
    loss_scaling: bool
    reason: str
    fp8: Fp8Spec | None = None

    def autocast(self, device_type: str) -> AbstractContextManager:
        """The context of forward passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        plain = torch.autocast(device_type, dtype=self.autocast_dtype)
        if self.fp8 is None or self.fp8.implementation != "te":
            return plain
        return _both(plain, te.autocast(self.fp8))

    def scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Dynamic loss scaler (doubles every 2000 clean steps, halves on overflow), or None if not needed."""
        return torch.amp.GradScaler(device_type) if self.loss_scaling else None


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def device_capability(device: torch.device) -> Capability | None:
    """CUDA compute capability of `device`; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def resolve(
    spec: PrecisionSpec,
    capability: Capability | None,
    problems: dict[str, str | None] | None = None,
    *,
    gpu: str = "this GPU",
) -> Precision:
    """The rung for training on a device of `capability` (None: CPU).

    Args:
        problems: `fp8_problems`, if other ranks contribute to them.
        gpu: the device's name in errors.

    Raises:
        SpecError: the spec names a dtype or FP8 implementation that cannot run here.
    """
    requested = spec.dtype
    if requested in ("auto", "fp8"):
        problems = fp8_problems(spec, capability) if problems is None else problems
        return (_automatic if requested == "auto" else _fp8_by_name)(spec.fp8, capability, problems)
    if requested == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        raise SpecError(
            f"train.precision.dtype bf16: {gpu} has compute capability {_text(capability)} and bf16 needs "
            f"{_text(BF16_CAPABILITY)}; write fp16 or auto"
        )
    return _rung(requested, f"{requested} was asked for")


def resolve_for_evaluation(spec: PrecisionSpec, capability: Capability | None) -> Precision:
    """As `resolve`, but `fp8` and `auto` are evaluated without FP8: the weights are FP32 anyway."""
    if spec.dtype not in ("fp8", "auto"):
        return resolve(spec, capability)
    return _below_fp8(capability, "evaluated without FP8")


def fp8_problem(fp8: Fp8Spec, implementation: str, capability: Capability | None) -> str | None:
    """Why an implementation cannot run the recipe on this device; None if it can."""
    if implementation == "emulated":
        return None
    if implementation == "te":
        return te.problem(fp8, capability)
    return torch_problem(fp8.recipe, E5M2 if fp8.hybrid else E4M3, capability)


def fp8_problems(spec: PrecisionSpec, capability: Capability | None) -> dict[str, str | None]:
    """For each candidate FP8 implementation, preferred first: why it cannot be used here, None if it can."""
    fp8 = spec.fp8
    named = spec.dtype == "fp8" and fp8.implementation != "auto"
    if named:
        return {fp8.implementation: fp8_problem(fp8, fp8.implementation, capability)}
    if spec.dtype != "fp8" and (spec.dtype != "auto" or capability is None or capability < FP8_CAPABILITY):
        return {}
    wanted = [name for name in PACKAGES if fp8.implementation in ("auto", name)]
    return {name: _unproven(fp8, name, capability) or fp8_problem(fp8, name, capability) for name in wanted}


def _unproven(fp8: Fp8Spec, implementation: str, capability: Capability | None) -> str | None:
    package = PACKAGES[implementation]
    version = parity.package_version(package)
    device_class = f"sm_{capability[0]}{capability[1]}" if capability else "cpu"
    if version is None:
        return "not installed"
    combination = "linear", implementation, fp8.recipe, device_class, version
    if outcome := parity.failure(*combination):
        return f"{fp8.recipe} scaling wrong on {device_class} with {package} {version}: {outcome}"
    if not parity.proven(*combination):
        return f"{fp8.recipe} scaling unproven on {device_class} with {package} {version}"
    return None


def _fp8_by_name(fp8: Fp8Spec, capability: Capability | None, problems: dict[str, str | None]) -> Precision:
    if fp8.implementation != "auto":
        if problem := problems[fp8.implementation]:
            raise SpecError(
                f"train.precision.dtype fp8 by {fp8.implementation}: {problem}; write bf16, or emulated to "
                "try it anywhere"
            )
        return _fp8(fp8, fp8.implementation, f"fp8 by {fp8.implementation} was asked for")
    implementation, reasons = _first_without(problems)
    if implementation is None:
        raise SpecError(
            f"train.precision.dtype fp8: no implementation is known to work here ({'; '.join(reasons)}); write bf16, "
            "or name one as train.precision.fp8.implementation: te, torch, or emulated (slow, anywhere)"
        )
    return _fp8(fp8, implementation, f"fp8 was asked for, {implementation} is proven here")


def _automatic(fp8: Fp8Spec, capability: Capability | None, problems: dict[str, str | None]) -> Precision:
    if capability is None or capability < FP8_CAPABILITY:
        return _below_fp8(capability, None)
    implementation, reasons = _first_without(problems)
    if implementation is None:
        reasons = reasons or [f"{fp8.implementation} is never chosen by itself"]
        return _below_fp8(capability, f"FP8 stays unused: {'; '.join(reasons)}")
    fp8 = fp8.updated({name: value for name, value in OF_AUTO.items() if getattr(fp8, name) is None})
    return _fp8(fp8, implementation, f"compute capability {_text(capability)} has FP8, proven by {implementation}")


def _below_fp8(capability: Capability | None, why_not_fp8: str | None) -> Precision:
    if capability is None:
        return _rung("fp32", "a CPU computes fp32 fastest and exactly; bf16 may be asked for")
    have = f"compute capability {_text(capability)}"
    if capability >= BF16_CAPABILITY:
        return _rung("bf16", f"{have}; {why_not_fp8 or f'below the {_text(FP8_CAPABILITY)} of FP8'}")
    return _rung("fp16", f"{have} is below BF16's {_text(BF16_CAPABILITY)}; FP16 runs with dynamic loss scaling")


def _first_without(problems: dict[str, str | None]) -> tuple[str | None, list[str]]:
    """The first implementation without a problem, or None and the problems."""
    first = next((name for name, problem in problems.items() if problem is None), None)
    return first, [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _fp8(fp8: Fp8Spec, implementation: str, reason: str) -> Precision:
    chosen = fp8.updated({"implementation": implementation})
    return Precision("fp8", torch.bfloat16, loss_scaling=False, reason=reason, fp8=chosen)


def _rung(name: str, reason: str) -> Precision:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
    return Precision(name, dtype, loss_scaling=name == "fp16", reason=reason)


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
