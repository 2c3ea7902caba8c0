"""Precision ladder: FP8 (compute capability 8.9) → BF16 (8.0) → FP16 with dynamic loss scaling → FP32 (CPU).

Weights, gradients and optimizer state are FP32 on every rung; what changes is the dtype that autocast gives to matrix
products. No FP8 linear layer exists here yet, so `auto` never stops on FP8: on a GPU that has it, it takes BF16 and
says why; asking for FP8 by name is an error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

Capability = tuple[int, int]

FP8_CAPABILITY: Capability = (8, 9)
BF16_CAPABILITY: Capability = (8, 0)


@dataclass(frozen=True)
class Precision:
    """One rung.

    Attributes:
        name: "bf16", "fp16" or "fp32".
        autocast_dtype: dtype of matrix products under autocast; None without autocast.
        loss_scaling: gradients underflow without it (FP16 has 5 bits of exponent).
        reason: why this rung, for the log.
    """

    name: str
    autocast_dtype: torch.dtype | None
    loss_scaling: bool
    reason: str

    def autocast(self, device_type: str) -> AbstractContextManager:
        """The context of forward passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Dynamic loss scaler (doubles every 2000 clean steps, halves on overflow), or None where none is needed."""
        return torch.amp.GradScaler(device_type) if self.loss_scaling else None


def device_capability(device: torch.device) -> Capability | None:
    """CUDA compute capability of `device`; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def resolve(requested: str, capability: Capability | None) -> Precision:
    """The rung for `PrecisionSpec.dtype` on a device of `capability` (None: CPU).

    Raises:
        ValueError: a dtype asked for by name that the device or this program cannot run.
    """
    if requested == "auto":
        return _automatic(capability)
    if requested == "fp8":
        raise ValueError("precision.dtype fp8: no FP8 layer is built in, so it cannot run; write auto or bf16")
    if requested == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        raise ValueError(
            f"precision.dtype bf16: this GPU has compute capability {_text(capability)} and bf16 needs "
            f"{_text(BF16_CAPABILITY)}; write fp16 or auto"
        )
    return _rung(requested, f"{requested} was asked for")


def _automatic(capability: Capability | None) -> Precision:
    if capability is None:
        return _rung("fp32", "a CPU computes fp32 fastest and exactly; bf16 may be asked for")
    have = f"compute capability {_text(capability)}"
    if capability >= FP8_CAPABILITY:
        return _rung("bf16", f"{have} has FP8, but no FP8 layer has been proven on this GPU, so it stays unused")
    if capability >= BF16_CAPABILITY:
        return _rung("bf16", f"{have} is below FP8's {_text(FP8_CAPABILITY)}")
    return _rung("fp16", f"{have} is below BF16's {_text(BF16_CAPABILITY)}; FP16 runs with dynamic loss scaling")


def _rung(name: str, reason: str) -> Precision:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
    return Precision(name, dtype, loss_scaling=name == "fp16", reason=reason)


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
