"""Load an exported model for inference: in FP32, BF16, INT8 or FP8.

    auto  as the export is stored; one in FP32: BF16 on a GPU that has it, else FP32
    bf16  matrices, embeddings, LM head and tables of Engram in BF16. What routes, normalises or decays stays FP32, as
          in the folders for transformers (trainer/hf/own.py)
    int8, fp8  the weights that trainer/model/quantised.py names, with a scale for each output channel

The residual stream is BF16 with `bf16`, and with `int8` and `fp8` on a GPU that has it; otherwise it is FP32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.data.tokenizer import Tokenizer
from trainer.errors import CheckpointError, SpecError
from trainer.export import WEIGHTS, assemble, read
from trainer.hf import own
from trainer.model.hybrid import HybridModel
from trainer.model.quantised import SCALE, quantised_state
from trainer.modelspec import ModelSpec
from trainer.ops.quantised import DTYPES, Kind
from trainer.precision import BF16_CAPABILITY, device_capability

Weights = Literal["auto", "fp32", "bf16", "int8", "fp8"]
WIDE: dict[Weights, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(
    directory: str | Path, device: torch.device | str = "cpu", weights: Weights = "auto"
) -> tuple[HybridModel, Tokenizer]:
    """The model and tokenizer of an exported directory, after its files were verified.

    Weights are converted on the CPU; `device` never holds more than the result.

    Raises:
        CheckpointError: naming the file that is missing, damaged or does not fit.
        SpecError: the export holds other weights of low precision.
    """
    directory, device = Path(directory), torch.device(device)
    manifest, spec = read(directory)
    held: Kind | None = manifest.get("weights")
    if held is not None and weights not in ("auto", held):
        raise SpecError(
            f"{directory} holds weights as {held}, which cannot become {weights}; name the export that it was made "
            f"from, or leave out --weights"
        )
    state: Mapping[str, Tensor] = load_file(directory / WEIGHTS)
    kind = held or next((kind for kind in DTYPES if kind == weights), None)
    stream = WIDE.get(weights) or natural(device)
    if kind is not None and held is None:
        state = quantise_state(directory, spec, state, kind)
    return assemble(directory, spec, cast(state, stream), device, kind=kind, stream=stream), Tokenizer.load(directory)


def natural(device: torch.device) -> torch.dtype:
    """BF16 on a GPU that has it, else FP32."""
    capability = device_capability(device)
    return torch.bfloat16 if capability is not None and capability >= BF16_CAPABILITY else torch.float32


def quantise_state(directory: Path, spec: ModelSpec, state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """`trainer.model.quantised.quantised_state` of an export.

    Raises:
        CheckpointError: a weight has Inf or NaN.
    """
    try:
        return quantised_state(spec, state, kind)
    except ValueError as error:
        raise CheckpointError(f"exported model: {directory}: {error}; export an earlier checkpoint") from None


def cast(state: Mapping[str, Tensor], stream: torch.dtype) -> Mapping[str, Tensor]:
    """The state dict for a residual stream of some dtype. INT8, FP8, their scales and what must be FP32 stay."""
    if stream == torch.float32:
        return state
    kept = (*own.FP32, SCALE)
    return {
        name: tensor if tensor.dtype != torch.float32 or name.endswith(kept) else tensor.to(stream)
        for name, tensor in state.items()
    }
