"""Weights out of Hugging Face folders into a model of ours, and back, tensor by tensor.

Files are read one after the other, and of each tensor only the rows that this rank holds; a model is never whole in
memory. FP8 checkpoints with blocks of 128 × 128 (`…_scale_inv`) are multiplied out. Numbers keep their value: what was
BF16 there is the same number in FP32 here, and comes back as it was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.hf import own
from trainer.hf.architectures import Architecture
from trainer.hf.configs import FP8_BLOCK
from trainer.kinds.base import Part
from trainer.model.rows import own_rows
from trainer.modelspec import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALES = "_scale_inv"
FP8 = ("F8_E4M3", "F8_E5M2")  # as safetensors name them
FLOATS = ("F64", "F32", "BF16", "F16", *FP8)
FP32 = ("e_score_correction_bias",)  # endings of names that stay FP32 there


def files_of(folder: Path) -> list[Path]:
    """The files with weights, in the order of their names.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(map(str, set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / INDEX}: is no index of weights; download it again") from None
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; give a folder with safetensors files")
    for name in names:
        if "/" in name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, but {INDEX} names it; download it again")
    return [folder / name for name in names]


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
    files = files_of(folder)
    _compare(files, by_name, ours, ignored, kept)
    filled = {part.ours for parts in by_name.values() for part in parts}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name not in filled and not name.startswith(kept):
                buffer.zero_()  # a router's bias, if their router has none
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is not a mapping
                    for part in by_name.get(name, []):
                        _fill(part, tensors, ours[part.ours])


def parts_of(architecture: Architecture, spec: ModelSpec) -> tuple[list[Part], tuple[str, ...]]:
    """Where the tensors of a model are in files of transformers, and the prefixes of names there to ignore."""
    tied = ("lm_head.",) if spec.tied_embedding else ()
    return architecture.parts(spec), architecture.ignored + tied


def _compare(
    files: list[Path],
    by_name: Mapping[str, list[Part]],
    ours: Mapping[str, Tensor],
    ignored: tuple[str, ...],
    kept: tuple[str, ...],
) -> None:
    missing = set(by_name)
    for file in files:
        with _opened(file) as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                if name in by_name:
                    if name not in missing:
                        raise CheckpointError(f"{file}: {name} is in another file too; download the folder again")
                    missing.discard(name)
                    _compare_shape(file, name, list(tensors.get_slice(name).get_shape()), by_name[name], ours)
                    _compare_dtype(file, name, tensors, names, ours[by_name[name][0].ours])
                elif not ((name.endswith(SCALES) and name.removesuffix(SCALES) in by_name) or name.startswith(ignored)):
                    raise CheckpointError(f"{file}: {name} belongs to no layer that config.json describes")
    missing = {name for name in missing if not all(part.ours.startswith(kept) for part in by_name[name])}
    if missing:
        raise CheckpointError(
            f"{files[0].parent}: {sorted(missing)[0]} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which config.json asks for"
        )


def _compare_shape(file: Path, name: str, found: list[int], parts: list[Part], ours: Mapping[str, Tensor]) -> None:
    shapes = [_shape(part, ours[part.ours]) for part in parts]
    wanted = [max(part.their_first + shape[0] for part, shape in zip(parts, shapes, strict=True)), *shapes[0][1:]]
    if [side for side in found if side != 1] != [side for side in wanted if side != 1]:
        raise CheckpointError(f"{file}: {name} has shape {found}, config.json asks for {wanted}")


def _compare_dtype(file: Path, name: str, tensors: Any, names: set[str], whole: Tensor) -> None:
    found = tensors.get_slice(name)
    dtype = found.get_dtype()
    if whole.is_floating_point() and dtype not in FLOATS:
        raise CheckpointError(
            f"{file}: {name} has dtype {dtype}; known are {', '.join(FLOATS)}: take the model in BF16"
        )
    if dtype in FP8:
        if name + SCALES not in names:
            raise CheckpointError(f"{file}: {name} is FP8, but {name}{SCALES} is not beside it; download it again")
        scales = tensors.get_slice(name + SCALES).get_shape()
        if scales != (wanted := [-(-side // FP8_BLOCK) for side in found.get_shape()]):
            raise CheckpointError(
                f"{file}: {name}{SCALES} has shape {scales}, blocks of {FP8_BLOCK} × {FP8_BLOCK} need {wanted}; take "
                "the model in BF16"
            )


def _shape(part: Part, whole: Tensor) -> tuple[int, ...]:
    """Of the rows of ours that a part is."""
    shape = tuple(whole.shape) if part.expert is None else tuple(whole.shape[1:])
    return (part.rows if part.rows is not None else shape[0] - part.first, *shape[1:])


def _fill(part: Part, tensors: Any, parameter: Tensor) -> None:
    """Copy what this rank holds of a part."""
    own, first = own_rows(parameter)
    shape = _shape(part, parameter)
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
    target[low - first : high - first].copy_(_rows(tensors, part.theirs, rows).reshape(high - low, *shape[1:]))


def _rows(tensors: Any, name: str, rows: slice) -> Tensor:
    """Some rows of a tensor in a file, multiplied out where it is FP8 by blocks."""
    values: Tensor = tensors.get_slice(name)[rows]
    if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return values
    first = rows.start // FP8_BLOCK
    scales: Tensor = tensors.get_slice(f"{name}{SCALES}")[first : -(-rows.stop // FP8_BLOCK)]
    by_row = scales.float().repeat_interleave(FP8_BLOCK, 0)[rows.start - first * FP8_BLOCK :][: values.shape[0]]
    return values.float() * by_row.repeat_interleave(FP8_BLOCK, 1)[:, : values.shape[1]]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is no readable safetensors file ({error}); download it again") from None


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
