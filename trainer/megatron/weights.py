"""Weights into checkpoints of Megatron core and out of them; neither Megatron nor a GPU is needed.

`from_model` writes the model of train.init_from as a checkpoint from which Megatron begins (--pretrained-checkpoint);
`to_checkpoint` makes the newest checkpoint of a Megatron run one of ours, of weights only, so that evaluation, export
and generation find it. Both hold a few tensors at a time. Weights are those that Megatron multiplies with, which are
BF16 in a BF16 or FP8 run; its FP32 copies belong to the optimizer and are not read.

    python -m trainer.megatron.weights import|export --spec train.yaml [--set a.b=c]…
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer import __version__
from trainer.checkpoints import checkpoint
from trainer.checkpoints.boxes import Box, Boxes, Shape, whole, write
from trainer.data.documents import shards_manifest
from trainer.data.manifest import read_manifest
from trainer.errors import CheckpointError, ForeseenError, SpecError
from trainer.fields import stored, version_of
from trainer.files import atomic_write, new_directory
from trainer.megatron.layout import MOST_PADDING, Matrix, extra_states, is_stacked, matrices
from trainer.megatron.progress import Progress
from trainer.megatron.sources import Source, biases, source_of
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.pretrained import find, refuse_misfit
from trainer.spec import TrainSpec
from trainer.specbase import VERSION_FIELD, changes_from_sets, deep_merge, parse, read_yaml

log = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")  # of a model; others belong to the optimizer


def from_model(spec: TrainSpec, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the weights of `spec.init_from` as the checkpoint `release` in `folder`, unless it is there; returns it.

    Raises:
        SpecError, CheckpointError: there is no such model, it is another one, or its files are damaged.
        VolumeError: it cannot be written.
    """
    if spec.init_from is None:
        raise SpecError("train.init_from is missing; name the model whose weights are to be converted")
    found = find(spec.init_from)
    refuse_misfit(found, spec.model)
    final, origin = folder / "release", found.digest or str(found.folder.resolve())
    if _written_from(final) == origin:
        return final
    stacked = is_stacked(spec.model)
    contents: dict[Box, Matrix] = {}
    for matrix in matrices(spec.model, stacked=stacked):
        for key in (matrix.key, *matrix.aliases):
            contents[_box(replace(matrix, key=key))] = matrix
    source = source_of(found, spec.model)
    empty = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], empty)
    states = dict.fromkeys(extra_states(spec.model, stacked=stacked), empty.getvalue())
    progress = Progress(f"weights of {found.folder} for Megatron", list(contents))
    with new_directory(final) as draft:
        write(draft, list(contents), partial(_dtype, dtype=dtype), partial(_ours, contents, source, progress), states)
        # What Megatron reads of a checkpoint besides its tensors, when it begins with one.
        shape = {"num_layers": len(spec.model.layers), "hidden_size": spec.model.hidden}
        assert spec.model.attention is not None
        shape |= {"num_attention_heads": spec.model.attention.num_heads}
        arguments = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, **shape)
        arguments.no_save_optim = arguments.no_save_rng = True
        torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": 0}, draft / "common.pt")
        (draft / "yaongi.json").write_text(json.dumps({"origin": origin}) + "\n", encoding="utf-8")
        (draft / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    atomic_write(folder / TRACKER, b"release")
    progress.done()
    return final


def to_checkpoint(spec: TrainSpec, folder: Path) -> Path:
    """Write the newest checkpoint in `folder` as a checkpoint of the run, unless it is there; returns it.

    Raises:
        CheckpointError: there is none, it is damaged, or of another model.
        DataError: shards or tokenizer are missing.
        VolumeError: it cannot be written.
    """
    newest, step = newest_iteration(folder)
    final = checkpoint.step_dir(spec.run_dir, step)
    if final in checkpoint.published(spec.run_dir):
        checkpoint.verify(final)
        return final
    boxes = Boxes(newest, foreign=True)
    pieces = _pieces(spec.model, boxes)
    wanted = {parameter.name: parameter.shape for parameter in parameters(spec.model)} | biases(spec.model)
    progress = Progress(f"weights of {newest}", ours := [whole(f"model.{name}", size) for name, size in wanted.items()])
    manifest = checkpoint.CheckpointManifest(
        step=step,
        spec={VERSION_FIELD: version_of(spec)} | stored(spec),
        code_version=f"yaongi {__version__}, from {newest.name} of Megatron-LM",
        digests={
            "shards": shards_manifest(spec.tokens).digest,
            "tokenizer": read_manifest(spec.tokens.tokenizer, "tokenizer").digest,
        },
        cursor={},
        world_size=1,
        scalars={},
        files={},
    )
    checkpoint.clean_unfinished(spec.run_dir)
    hidden = checkpoint.unfinished_dir(spec.run_dir, step)
    try:
        hidden.mkdir(parents=True)
        write(hidden, ours, lambda _: torch.float32, partial(_theirs, boxes, pieces, progress))
        files = checkpoint.describe_files(hidden, [file.name for file in hidden.iterdir()])
        path = checkpoint.publish(spec.run_dir, manifest.model_copy(update={"files": files}))
    finally:
        checkpoint.clean_unfinished(spec.run_dir)
    checkpoint.prune(spec.run_dir, spec.checkpoint.keep_last, spec.decay_begins)
    progress.done()
    return path


def newest_iteration(folder: Path) -> tuple[Path, int]:
    """The checkpoint that Megatron would resume from, and its number of steps.

    Raises:
        CheckpointError: there is none.
    """
    try:
        said = (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{folder / TRACKER}: cannot be read, no checkpoint is finished; train first") from None
    if not said.isdecimal():
        raise CheckpointError(f"{folder / TRACKER}: says {said[:20]!r} and no number of steps; train first")
    found = folder / f"iter_{int(said):07d}"
    if not found.is_dir():
        raise CheckpointError(f"{found}: missing, but {TRACKER} names it; restore it, or write an older number there")
    return found, int(said)


def _written_from(folder: Path) -> str | None:
    try:
        origin = json.loads((folder / "yaongi.json").read_bytes())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(origin)


def _dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if key.endswith("router.expert_bias") else dtype  # as Megatron keeps it


def _box(matrix: Matrix) -> Box:
    ones, rest = (1,) * len(matrix.stack), (matrix.count, *matrix.columns)
    return Box(matrix.key, matrix.shape, (*matrix.at, *(0 for _ in rest)), (*ones, *rest))


def _ours(contents: Mapping[Box, Matrix], source: Source, progress: Progress, box: Box) -> Tensor:
    """The content of a box of Megatron, from our tensors."""
    values = torch.cat([source.read(part) for part in contents[box].parts])
    if not values.isfinite().all():
        raise CheckpointError(f"train.init_from: {contents[box].parts[0].name} is not finite; use another model")
    progress.advance(box)
    return values.reshape(box.shape)


Pieces = dict[str, list[tuple[Box, Callable[[Tensor], Tensor]]]]


def _pieces(model: ModelSpec, boxes: Boxes) -> Pieces:
    """By our tensor: boxes of Megatron's tensors, and the parts of ours that they fill.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    found: Pieces = {}
    known: set[str] = set()
    stacked = not any(key.startswith("decoder.layers.0.") for key in boxes.shapes)
    for matrix in matrices(model, stacked=stacked):
        keys = (matrix.key, *matrix.aliases)
        known |= {*keys}
        key = next((key for key in keys if key in boxes.shapes), None)
        if key is None and matrix.optional:
            continue
        if key is None:
            raise _other(boxes, f"has no {' or '.join(keys)}")
        _compare(boxes, matrix, key)
        for box, fills, name in _of_matrix(replace(matrix, key=key), boxes.shapes[key]):
            found.setdefault(name, []).append((box, fills))
    if foreign := sorted(key for key in boxes.shapes if key.startswith(WEIGHTS) and key not in known):
        raise _other(boxes, f"has {foreign[0]}, which train.model does not")
    return found


def _compare(boxes: Boxes, matrix: Matrix, key: str) -> None:
    has, needs = boxes.shapes[key], matrix.shape
    padding = has[0] - needs[0] if matrix.padded and has[1:] == needs[1:] else 0
    if not 0 <= padding < MOST_PADDING or (not padding and has != needs):
        raise _other(boxes, f"{key} has shape {list(has)}, train.model needs {list(needs)}")


def _of_matrix(matrix: Matrix, size: Shape) -> Iterator[tuple[Box, Callable[[Tensor], Tensor], str]]:
    row, ones = 0, (1,) * len(matrix.stack)
    for part in matrix.parts:
        offset = (*matrix.at, row, *(0 for _ in matrix.columns))
        shape = (*ones, part.count, *matrix.columns)
        fills = partial(_place, part.expert, part.first, part.count, shape)
        yield Box(matrix.key, size, offset, shape), fills, part.name
        row += part.count


def _place(expert: int | None, first: int, count: int, shape: Shape, ours: Tensor) -> Tensor:
    """Rows of a tensor of ours, in the shape of the box that they come from."""
    return (ours if expert is None else ours[expert])[first : first + count].view(shape)


def _theirs(boxes: Boxes, pieces: Pieces, progress: Progress, box: Box) -> Tensor:
    """A tensor of ours, from Megatron's boxes."""
    name = box.key.removeprefix("model.")
    values = torch.zeros(box.shape)
    for piece, fills in pieces.get(name, []):
        boxes.read(piece, fills(values))
    if not values.isfinite().all():
        raise CheckpointError(f"{boxes.folder}: {name} is not finite; go back to an older checkpoint")
    progress.advance(box)
    return values


def _other(boxes: Boxes, what: str) -> CheckpointError:
    return CheckpointError(f"{boxes.folder} holds another model than train.model: {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m trainer.megatron.weights", description=__doc__.split("\n")[0])
    made.add_argument("task", choices=("import", "export"))
    made.add_argument("--spec", required=True, metavar="FILE", help="TrainSpec as YAML or JSON")
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field; may be repeated")
    options = made.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        spec = parse(TrainSpec, deep_merge(read_yaml(options.spec), changes_from_sets(options.set)), options.spec)
        folder = Path(spec.run_dir) / "megatron"
        print(from_model(spec, folder / "begin") if options.task == "import" else to_checkpoint(spec, folder))
    except ForeseenError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
