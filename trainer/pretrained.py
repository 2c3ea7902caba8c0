"""Folders with a trained model that a run can start from: our runs, checkpoints and exports, or a transformers folder.

The model's configuration is compared with that of the run before any weight is read. Imports no torch; `trainer.begin`
reads the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoints.checkpoint import MANIFEST as CHECKPOINT
from trainer.checkpoints.checkpoint import candidates
from trainer.checkpoints.checkpoint import read_manifest as read_checkpoint
from trainer.errors import CheckpointError, SpecError
from trainer.fields import stored
from trainer.files import unreadable
from trainer.hf.architectures import Architecture, architecture_of
from trainer.hf.files import SINGLE, compare, header, parts_of
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.specbase import VERSION_FIELD, parse, read_yaml

CONFIG, EXPORT = "config.json", "manifest.json"
TOKENIZER = "tokenizer.json"
MTP = "mtp."  # prefix of parameters that may be missing in the other model
TRAINING_ONLY = ("init_std", "mtp", "lora")  # fields of a model that do not affect its trained weights


def is_weights(name: str) -> bool:
    """Whether a file beside config.json holds weights, or is the index of the weight files."""
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name


@dataclass(frozen=True)
class Pretrained:
    """
    Attributes:
        folder: the folder with the weights; for a run, the checkpoint that it would resume from.
        kind: the format of the folder.
        model: its architecture.
        architecture: the architecture in transformers; None for our own formats.
        tokenizer: the folder with its tokenizer.json; None if there is none.
        digest: the digest of a checkpoint or export; "" for a transformers folder.
    """

    folder: Path
    kind: Literal["checkpoint", "export", "transformers"]
    model: ModelSpec
    architecture: Architecture | None
    tokenizer: Path | None
    digest: str


def find(folder: str | Path) -> Pretrained:
    """The model in a folder.

    Raises:
        SpecError: there is no such folder, it holds no model, or the architecture is not supported.
        CheckpointError: it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpecError(f"{folder} is not a folder on this machine; check the path")
    if (folder / "checkpoints").is_dir():
        found = candidates(folder)
        if not found:
            raise SpecError(f"{folder} has no checkpoint yet; train it first, or name another model")
        folder = found[0]
    if (folder / CHECKPOINT).is_file():
        return _checkpoint(folder)
    if not (folder / CONFIG).is_file():
        raise SpecError(
            f"{folder} holds no model; name a run, a checkpoint (step-…), an export, or a transformers folder with "
            f"{CONFIG} and safetensors files"
        )
    config = read_json(folder / CONFIG)
    if "layers" in config and "model_type" not in config:
        return _export(folder, config)
    return _of_transformers(folder, config)


def tokenizer_of(folder: str | Path) -> Path:
    """The folder with the tokenizer of a model, or `folder` itself if it holds a tokenizer and no model.

    Raises:
        SpecError: there is no tokenizer.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).is_file() and not (folder / CHECKPOINT).is_file():
        return folder
    found = find(folder).tokenizer
    if found is None:
        raise SpecError(f"{folder} has no {TOKENIZER}; set tokenizer.from to another model or to a folder with one")
    return found


def refuse_quantised(folder: Path, manifest: dict[str, Any], what: str) -> None:
    """
    Args:
        manifest: the content of an export's manifest.json.
        what: needs whole weights.

    Raises:
        SpecError: the export holds weights of low precision.
    """
    if weights := manifest.get("weights"):
        raise SpecError(f"{folder} holds weights as {weights}, but {what} FP32; name the export that it was made from")


def refuse_misfit(found: Pretrained, model: ModelSpec) -> None:
    """
    Raises:
        SpecError: the run's model is a different one (the message names the first field that differs), or the weights
            are not a complete model.
    """
    if found.model.lora is not None:
        raise SpecError(
            f"{found.folder} holds adapters (train.model.lora), not merged; export that run, which merges them, and "
            "give its export"
        )
    if found.kind == "export":
        refuse_quantised(found.folder, read_json(found.folder / EXPORT), "training begins with")
    theirs, ours = _weights_fields(found.model), _weights_fields(model)
    for field in [*ours, *(name for name in theirs if name not in ours)]:
        if theirs.get(field) != ours.get(field):
            raise SpecError(
                f"train.model.{field} is {_shown(ours.get(field))}, but the model in {found.folder} has "
                f"{_shown(theirs.get(field))}; use its value (yaongi describe {found.folder} prints all of them)"
            )
    if found.architecture is not None and (reason := found.architecture.misfit(_without_training(model))):
        kind = found.architecture.model_type
        raise SpecError(f"train.model does not fit {found.folder}, which holds a model of type {kind}: {reason}")
    if found.architecture is None and found.model.layers != model.layers:
        raise SpecError(
            f"train.model.layers {model.layers} is divided differently in {found.folder}: {found.model.layers}"
        )


def refuse_damaged(found: Pretrained, model: ModelSpec) -> None:
    """Compare the headers of the model's files with the run's model, before data is prepared for the run. Checkpoints
    and the contents of exports are verified by their checksums when the run starts.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, superfluous or of another shape or dtype.
    """
    if found.kind == "export":
        header(found.folder / SINGLE)
    elif found.architecture is not None:
        parts, ignored = parts_of(found.architecture, model)
        shapes = {parameter.name: parameter.shape for parameter in parameters(model)}
        compare(found.folder, parts, shapes, ignored=(*ignored, MTP), kept=(MTP,))


def _without_training(model: ModelSpec) -> ModelSpec:
    """The model with fields that matter only in training set to the values that every architecture supports."""
    if model.moe is None:
        return model
    moe = model.moe.updated({"bias_update_rate": 0.0} if model.moe.scores == "softmax" else {})
    return model.model_copy(update={"moe": moe})


def _weights_fields(model: ModelSpec) -> dict[str, Any]:
    """Every field on which the weights or their use depend, by its path; layers as one string."""
    found: dict[str, Any] = {"layers": "".join(model.layers)}
    used = {id(section) for section in model.used()}
    for name, value in stored(model, {*TRAINING_ONLY, "layers"}).items():
        section = getattr(model, name)
        if isinstance(value, dict) and hasattr(section, "training_only"):
            if id(section) in used:
                found |= {f"{name}.{key}": inner for key, inner in value.items() if key not in section.training_only}
        elif value is not None and value != []:
            found[name] = value
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _checkpoint(folder: Path) -> Pretrained:
    manifest = read_checkpoint(folder)
    version = manifest.spec.get(VERSION_FIELD, 1)
    model = parse(ModelSpec, manifest.spec["model"], str(folder), version)
    run = folder.parents[1] / "train.yaml"  # if the run has moved, it has the tokenizer's new place
    specs = [manifest.spec, *([read_yaml(run)] if run.is_file() else [])]
    places = (Path(spec["tokens"]["tokenizer"]) for spec in specs)
    tokenizer = next((place for place in places if (place / TOKENIZER).is_file()), None)
    return Pretrained(folder, "checkpoint", model, None, tokenizer, manifest.digest)


def _export(folder: Path, config: dict[str, Any]) -> Pretrained:
    if not (folder / EXPORT).is_file():
        raise CheckpointError(f"{folder / EXPORT}: missing beside {CONFIG} of an export; copy the whole export again")
    manifest = read_json(folder / EXPORT)
    model = parse(ModelSpec, config, str(folder / CONFIG), manifest.get(VERSION_FIELD, 1))
    digest = manifest.get("checkpoint_digest", "")
    return Pretrained(folder, "export", model, None, _beside(folder), digest)


def _of_transformers(folder: Path, config: dict[str, Any]) -> Pretrained:
    where = str(folder / CONFIG)
    if config.get("model_type") == "yaongi":
        raise SpecError(f"{folder} is the part of an export that transformers reads; name its parent folder")
    architecture = architecture_of(config, where)
    try:
        fields = architecture.reads(config)
    except KeyError as error:
        kind = architecture.model_type
        raise SpecError(f"{where}: has no {error.args[0]}, which a model of type {kind} needs") from None
    except SpecError as error:
        raise SpecError(f"{folder}/{error}") from None
    return Pretrained(folder, "transformers", parse(ModelSpec, fields, where), architecture, _beside(folder), "")


def _beside(folder: Path) -> Path | None:
    return folder if (folder / TOKENIZER).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; write or download it again")
    return value
