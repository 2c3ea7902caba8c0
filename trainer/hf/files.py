"""Compare the headers of a model's weight files with a model; no weights are read. Imports no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.errors import CheckpointError
from trainer.files import unreadable
from trainer.hf.architectures import Architecture
from trainer.hf.configs import FP8_BLOCK
from trainer.kinds.base import Part
from trainer.modelspec import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALES = "_scale_inv"
FP8 = ("F8_E4M3", "F8_E5M2")  # as safetensors name them
FLOATS = ("F64", "F32", "BF16", "F16", *FP8)
Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: list[int]


def files_of(folder: Path) -> list[Path]:
    """The files with weights, in the order of their names.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(map(str, set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / INDEX}: is not a valid index of weights; download it again") from None
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; give a folder with safetensors files")
    for name in names:
        if "/" in name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, but {INDEX} names it; download it again")
    return [folder / name for name in names]


def header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged or cut.
        UnreadableError: it cannot be read.
    """
    try:
        with file.open("rb") as data:
            size = file.stat().st_size
            length = int.from_bytes(data.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header does not end within the file")
            found = {name: entry for name, entry in json.loads(data.read(length)).items() if name != "__metadata__"}
        if (needed := 8 + length + max((entry["data_offsets"][1] for entry in found.values()), default=0)) != size:
            raise ValueError(f"it has {size:,} bytes, its header needs {needed:,}")
        return {name: Stored(str(entry["dtype"]), list(entry["shape"])) for name, entry in found.items()}
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file}: is not a readable safetensors file ({said}); download it again") from None


def parts_of(architecture: Architecture, spec: ModelSpec) -> tuple[list[Part], tuple[str, ...]]:
    """Where a model's tensors are in transformers' files, and the prefixes of tensor names to ignore there."""
    tied = ("lm_head.",) if spec.tied_embedding else ()
    return architecture.parts(spec), architecture.ignored + tied


def compare(
    folder: Path,
    parts: Iterable[Part],
    ours: Mapping[str, Shape],
    *,
    ignored: tuple[str, ...] = (),
    kept: tuple[str, ...] = (),
    integers: Collection[str] = (),
) -> dict[str, Path]:
    """Compare names, shapes and dtypes of the tensors in a folder's files with those of a model. Returns the file of
    each tensor.

    Args:
        parts: where each of our tensors is in the files.
        ours: shapes by name; a tensor without a shape here only has to exist.
        ignored: prefixes of additional names that the files may contain.
        kept: prefixes of our names that may be missing in the files.
        integers: our tensors that are not floating point.

    Raises:
        CheckpointError: a tensor is missing, superfluous, wrongly shaped or of an unknown dtype, or a file is damaged.
    """
    by_name: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        by_name[part.theirs].append(part)
    where: dict[str, Path] = {}
    tensors: dict[str, Stored] = {}
    for file in files_of(folder):
        for name, stored in header(file).items():
            if name in where and name in by_name:
                raise CheckpointError(f"{file}: {name} is in another file too; download the folder again")
            where[name], tensors[name] = file, stored
    for name, file in where.items():
        if name in by_name:
            _compare_shape(file, name, tensors[name].shape, by_name[name], ours)
            if not any(part.ours in integers for part in by_name[name]):
                _compare_dtype(file, name, tensors)
        elif not ((name.endswith(SCALES) and name.removesuffix(SCALES) in by_name) or name.startswith(ignored)):
            raise CheckpointError(f"{file}: {name} belongs to no layer that config.json describes")
    absent = by_name.keys() - where.keys()
    missing = {name for name in absent if not all(part.ours.startswith(kept) for part in by_name[name])}
    if missing:
        raise CheckpointError(
            f"{folder}: {sorted(missing)[0]} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which config.json requires"
        )
    return where


def _compare_shape(file: Path, name: str, found: list[int], parts: list[Part], ours: Mapping[str, Shape]) -> None:
    if any(part.ours not in ours for part in parts):
        return
    shapes = [shape_of(part, ours[part.ours]) for part in parts]
    wanted = [max(part.their_first + shape[0] for part, shape in zip(parts, shapes, strict=True)), *shapes[0][1:]]
    if [side for side in found if side != 1] != [side for side in wanted if side != 1]:
        raise CheckpointError(f"{file}: {name} has shape {found}, config.json requires {wanted}")


def _compare_dtype(file: Path, name: str, tensors: Mapping[str, Stored]) -> None:
    dtype, shape = tensors[name]
    if dtype not in FLOATS:
        known = ", ".join(FLOATS)
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, supported are {known}; use the model in BF16")
    if dtype in FP8:
        if (scales := tensors.get(name + SCALES)) is None:
            raise CheckpointError(f"{file}: {name} is FP8, but {name}{SCALES} is missing; download it again")
        if scales.shape != (wanted := [-(-side // FP8_BLOCK) for side in shape]):
            raise CheckpointError(
                f"{file}: {name}{SCALES} has shape {scales.shape}, blocks of {FP8_BLOCK} × {FP8_BLOCK} need {wanted}; "
                "use the model in BF16"
            )


def shape_of(part: Part, whole: Shape) -> Shape:
    """The shape of a part: of its rows in our tensor."""
    shape = whole if part.expert is None else whole[1:]
    return (part.rows if part.rows is not None else shape[0] - part.first, *shape[1:])
