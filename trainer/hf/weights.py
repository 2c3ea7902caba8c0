"""Weights out of Hugging Face folders into a model of ours, and back, tensor by tensor.

Files are read one after the other, and of each tensor only the rows that this rank holds; a model is never whole in
memory. FP8 checkpoints with blocks of 128 × 128 (`…_scale_inv`) are multiplied out. Numbers keep their value: what was
BF16 there is the same number in FP32 here, and comes back as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.hf import own
from trainer.hf.architectures import Architecture
from trainer.hf.configs import FP8_BLOCK
from trainer.hf.files import SCALES, compare, files_of, shape_of
from trainer.kinds.base import Part
from trainer.model.rows import own_rows
from trainer.modelspec import ModelSpec

FP32 = ("e_score_correction_bias",)  # endings of names that stay FP32 there


def read_into(
    folder: Path,
    parts: Iterable[Part],
    model: nn.Module,
    *,
    ignored: tuple[str, ...] = (),
    kept: tuple[str, ...] = (),
) -> None:
    """Fill the parameters of `model`, or the parts that this rank holds, and its buffers.

    Shapes and names in all files are compared first, so that a model that does not fit uses no memory.

    Args:
        parts: where each tensor is in the files.
        ignored: prefixes of names that the files may contain in addition.
        kept: prefixes of our names; tensors with them keep their values if the files do not have them.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape, or a file is damaged.
    """
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    by_name: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        by_name[part.theirs].append(part)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    integers = {name for name, tensor in ours.items() if not tensor.is_floating_point()}
    every = [part for some in by_name.values() for part in some]
    where = compare(folder, every, shapes, ignored=ignored, kept=kept, integers=integers)
    filled = {part.ours for parts in by_name.values() for part in parts}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name not in filled and not name.startswith(kept):
                buffer.zero_()  # a router's bias, if their router has none
        for file in files_of(folder):
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is not a mapping
                    for part in by_name.get(name, []):
                        # The scales of a file's last weight may be in the next file.
                        scales = where.get(name + SCALES, file)
                        _fill(part, tensors, ours[part.ours], None if scales == file else scales)


def _fill(part: Part, tensors: Any, parameter: Tensor, elsewhere: Path | None) -> None:
    """Copy what this rank holds of a part.

    Args:
        elsewhere: the file with the FP8 scales of the tensor, if it is another one.
    """
    own, first = own_rows(parameter)
    shape = shape_of(part, tuple(parameter.shape))
    if part.expert is not None:
        if not first <= part.expert < first + own.shape[0]:
            return
        target, start, end = own[part.expert - first], part.first, part.first + shape[0]
        low, high = start, end
        first = 0
    else:
        start, end = part.first, part.first + shape[0]
        target, low, high = own, max(start, first), min(end, first + own.shape[0])
    if low >= high:
        return
    rows = slice(part.their_first + low - start, part.their_first + high - start)
    values = rows_of(tensors, part.theirs, rows, elsewhere)
    target[low - first : high - first].copy_(values.reshape(high - low, *shape[1:]))


def rows_of(tensors: Any, name: str, rows: slice, elsewhere: Path | None) -> Tensor:
    """Some rows of a tensor in a file, multiplied by its scales if it is FP8 by blocks."""
    values: Tensor = tensors.get_slice(name)[rows]
    if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return values
    first, blocks = rows.start // FP8_BLOCK, slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK))
    with nullcontext(tensors) if elsewhere is None else opened(elsewhere) as holder:
        scales: Tensor = holder.get_slice(f"{name}{SCALES}")[blocks]
    by_row = scales.float().repeat_interleave(FP8_BLOCK, 0)[rows.start - first * FP8_BLOCK :][: values.shape[0]]
    return values.float() * by_row.repeat_interleave(FP8_BLOCK, 1)[:, : values.shape[1]]


def opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is not a readable safetensors file ({error}); download it again") from None


def tensors(
    architecture: Architecture, spec: ModelSpec, state: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A whole model's tensors under their names, in their order; what routes stays FP32 where theirs does."""
    by_name: dict[str, list[Part]] = {}
    for part in architecture.parts(spec):
        by_name.setdefault(part.theirs, []).append(part)
    for name, parts in by_name.items():
        yield name, torch.cat(list(_pieces(parts, state))).to(torch.float32 if name.endswith(FP32) else dtype)
    for name, shape in architecture.zeros(spec).items():
        yield name, torch.zeros(shape, dtype=dtype)


def without_place(architecture: Architecture, spec: ModelSpec, state: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor of a model that does something and that theirs does not have; multi-token prediction, which only
    trains, does not count."""
    placed = {part.ours for part in architecture.parts(spec)}
    left = (name for name in state if name not in placed and not name.startswith("mtp."))
    return next((name for name in left if state[name].any()), None)


def _pieces(parts: Iterable[Part], state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for part in sorted(parts, key=lambda part: part.their_first):
        whole = state[part.ours]
        matrix = whole if part.expert is None else whole[part.expert]
        rows = matrix[part.first :] if part.rows is None else matrix[part.first : part.first + part.rows]
        yield rows[:, None] if part.theirs.endswith("conv1d.weight") else rows


def own_tensors(state: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A whole model's tensors under our names, without multi-token prediction. Integers and some FP32 tensors keep
    their dtype."""
    for name, tensor in state.items():
        if not name.startswith("mtp."):
            wide = name.endswith(own.FP32) or not tensor.is_floating_point()
            yield name, tensor if wide else tensor.to(dtype)
