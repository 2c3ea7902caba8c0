"""The setting of an operation, from which a backend decides whether it can run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from trainer.modelspec import ModelSpec

VARIANT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Setting:
    """Device, dtype of the activations between matrix products, and the model (None: its widths are not asked)."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    model: ModelSpec | None = None

    @property
    def variant(self) -> str:
        return VARIANT[self.dtype]

    @property
    def device_class(self) -> str:
        """`sm_90` for compute capability 9.0, else the device type; Triton's interpreter is a class of its own."""
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"sm_{major}{minor}"
        return "interpreter" if interpreted(self.device) else self.device.type

    def below(self, major: int, minor: int) -> str | None:
        """A reason, unless the device is a GPU of at least this compute capability."""
        if self.device.type != "cuda":
            return "needs a CUDA device"
        if (have := torch.cuda.get_device_capability(self.device)) < (major, minor):
            return f"needs compute capability {major}.{minor}, this GPU has {have[0]}.{have[1]}"
        return None

    def own_kernels(self) -> str | None:
        """None where Triton kernels of ours run: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
        if not interpreted(self.device):
            return self.below(8, 0)
        if self.dtype is not torch.float32:  # NumPy has no BF16
            return "Triton's interpreter computes fp32 only"
        return None


def interpreted(device: torch.device) -> bool:
    """Whether Triton kernels run on the CPU here, in its interpreter."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
