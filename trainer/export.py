"""Export a trained model as one self-contained directory: weights, config, tokenizer, digests and a model card.

    model.safetensors   parameters and router biases in FP32, under their module names; adapters merged into theirs
    config.json         ModelSpec
    tokenizer.json      as trained; tokenizer_config.json lets transformers' AutoTokenizer load it
    transformers/       a folder that transformers loads, in the dtype of train.export (trainer/hf)
    README.md           model card: data and licences, shares, evaluation
    manifest.json       origin, counts, and size and digests of all files above
    passport.json       data, code and training that it comes from, and the digests of all files above
    passport.dsse.json  signature of the passport, if a key is given (trainer/signing.py)

Format 1 is FP32. Format 2, written by trainer/quantise.py, has `weights` int8 or fp8 in its manifest: in
model.safetensors the weights that trainer/model/quantised.py names are of that dtype, with the FP32 scales of their
rows under the same name and `_scale`; the rest is FP32, and there is no folder transformers. A version that does not
know a format refuses it.

It is written under a hidden name and renamed, so a directory named `export` is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import load_file, save_file

from trainer import __version__, exported, exportlinks, gate, passport, signing
from trainer.checkpoints.checkpoint import CheckpointFile, describe_files, step_of
from trainer.data.tokenizer import Tokenizer, files_of
from trainer.errors import CheckpointError
from trainer.evaluation.scores import judged_by, limited, rows
from trainer.fields import stored, version_of
from trainer.files import checksum, new_directory, sync_directory
from trainer.hf import own
from trainer.hf.architectures import native
from trainer.hf.folder import write as write_folder
from trainer.hf.weights import own_tensors, tensors, without_place
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.lora import merge
from trainer.model.quantised import install
from trainer.modelspec import ModelSpec
from trainer.ops import quantised
from trainer.ops.quantised import Kind, aligned
from trainer.report import update_report
from trainer.report.run import Run, read_run
from trainer.spec import BackendsSpec, TrainSpec
from trainer.specbase import VERSION_FIELD, parse
from trainer.trained import Trained, load_trained

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

log = logging.getLogger(__name__)

FORMAT, QUANTISED_FORMAT = 1, 2
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
TRANSFORMERS = "transformers"
FORMATS = [(FORMAT, None), *((QUANTISED_FORMAT, kind) for kind in quantised.DTYPES)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(spec: TrainSpec) -> dict[str, Any]:
    """Export the newest checkpoint of the run to run_dir/export; returns the manifest and updates the report.

    Raises:
        GateError: the model has not passed the gates of its spec.
        LaunchError, CheckpointError, DataError: no checkpoint, none that verifies, tokenizer missing or different.
        SpecError: the key for the signature cannot be used.
    """
    signer = signing.signer()
    gate.refuse(spec)
    manifest = _export(spec, exported.final_dir(spec.run_dir), signer)
    exportlinks.show(spec)
    update_report(spec.run_dir)
    return manifest


def run_at(spec: TrainSpec, checkpoint: Path) -> dict[str, Any]:
    """Export one checkpoint, of a run that may be training now, to run_dir/exports/step-<n>; returns the manifest.

    Gates and signature are of the final export alone.

    Raises:
        CheckpointError, DataError: it does not verify, tokenizer missing or different.
        VolumeError: it cannot be written.
    """
    manifest = _export(spec, exported.step_dir(spec.run_dir, step_of(checkpoint)), None, checkpoint)
    exportlinks.show(spec)
    return manifest


def _export(
    spec: TrainSpec, final: Path, signer: CryptoSigner | None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Write the export of a checkpoint, by default the newest, to `final`."""
    # Weights are only copied: the kernels named for training need not exist here.
    weights_only = spec.model_copy(update={"backends": BackendsSpec()})
    trained = load_trained(weights_only, torch.device("cpu"), path=checkpoint)
    trained_as = spec
    if spec.model.lora is not None:
        merge(trained.model)
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"lora": None})})
    record = read_run(spec.run_dir)
    if checkpoint is not None:  # the run has gone on
        step = trained.checkpoint.step
        until = [line for line in record.steps if line["step"] <= step]
        record = replace(record, steps=until, checkpoint=trained.checkpoint)
    with new_directory(final) as draft:
        manifest = _write(draft, spec, trained, record)
        passport.write(draft, trained_as, trained.checkpoint, manifest, record)
        if signer is not None:
            key_id = signing.sign(draft, *passport.read(draft / passport.PASSPORT), signer)
            log.info("signed the passport with key %s", key_id)
        sync(draft / passport.PASSPORT)
    log.info("exported %d parameters to %s", manifest["parameters"], final)
    return manifest


def load(directory: str | Path, device: torch.device | str = "cpu") -> tuple[HybridModel, Tokenizer]:
    """The model and tokenizer of an exported directory, after its files were verified. Weights are as they are stored;
    `trainer.loading` converts them.

    Raises:
        CheckpointError: naming the file that is missing, damaged or does not fit.
    """
    directory = Path(directory)
    manifest, spec = read(directory)
    state = load_file(directory / WEIGHTS, device=str(device))
    return assemble(directory, spec, state, device, kind=manifest.get("weights")), Tokenizer.load(directory)


def assemble(
    directory: Path,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    device: torch.device | str,
    *,
    kind: Kind | None = None,
    stream: torch.dtype = torch.float32,
) -> HybridModel:
    """The model of a state dict, on `device`.

    Args:
        directory: where the state comes from.
        kind: of its quantised weights; None: it has none.
        stream: dtype of the residual stream.

    Raises:
        CheckpointError: the state has other tensors than the model.
    """
    model = build_model(spec, device=device, dtype=None if stream == torch.float32 else stream, seed=None)
    if kind is not None:
        install(model, spec, kind, stream)
    if different := sorted(state.keys() ^ model.state_dict().keys()):
        raise _damaged(directory / WEIGHTS, f"and config.json disagree about {different[0]}")
    state = {name: tensor.to(device) for name, tensor in state.items()}
    if kind == "int8":
        state = {name: aligned(tensor) if tensor.dtype == torch.int8 else tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def read(directory: Path) -> tuple[dict[str, Any], ModelSpec]:
    """The manifest and the architecture of an exported directory, after its files were verified.

    Raises:
        CheckpointError: naming the file that is missing, damaged or does not fit.
    """
    manifest = _read_json(directory / MANIFEST)
    if (manifest.get("format"), manifest.get("weights")) not in FORMATS:
        stated = f"{manifest.get('format')} {manifest.get('weights', '')}".rstrip()
        raise _damaged(directory / MANIFEST, f"has format {stated}, this version reads up to {QUANTISED_FORMAT}")
    try:
        expected = {name: CheckpointFile.model_validate(entry) for name, entry in manifest["files"].items()}
    except (KeyError, AttributeError, ValueError):
        raise _damaged(directory / MANIFEST, "does not name the files of an export") from None
    for name in expected:
        if not (directory / name).is_file():
            raise _damaged(directory / name, "is missing")
    for name, entry in describe_files(directory, expected).items():
        if entry != expected[name]:
            raise _damaged(directory / name, "differs from what was written")
    config = directory / "config.json"
    return manifest, parse(ModelSpec, _read_json(config), str(config), manifest.get(VERSION_FIELD, 1))


def _write(draft: Path, spec: TrainSpec, trained: Trained, record: Run) -> dict[str, Any]:
    state = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(state, draft / WEIGHTS, metadata={"format": "pt"})
    write_text(draft / "config.json", json.dumps(stored(spec.model), indent=1) + "\n")
    shutil.copymode(draft / "config.json", draft / WEIGHTS)  # safetensors ignores the umask
    tokenizer = files_of(Path(spec.tokens.tokenizer))
    for file in tokenizer:
        shutil.copyfile(file, draft / file.name)
    beside = _write_for_transformers(draft / TRANSFORMERS, spec, state)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        VERSION_FIELD: version_of(spec.model),
        "name": spec.run,
        "code_version": __version__,
        "checkpoint_digest": trained.checkpoint.digest,
        "step": trained.checkpoint.step,
        "data": trained.checkpoint.digests,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "tensors": len(state),
        "transformers_dtype": spec.exporting.dtype,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
    }
    if beside:
        manifest["transformers"] = TRANSFORMERS
        manifest["trust_remote_code"] = f"{TRANSFORMERS}/{own.CODE[0].name}" in beside
    write_text(draft / "README.md", model_card(record, manifest))
    names = sorted((WEIGHTS, "config.json", *(file.name for file in tokenizer), "README.md", *beside))
    manifest["passport"] = passport.PASSPORT
    manifest["sha256"] = {name: checksum(draft / name, "sha256") for name in names}
    manifest["files"] = {name: entry.model_dump() for name, entry in describe_files(draft, names).items()}
    for name in names:
        sync(draft / name)
    write_text(draft / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync(draft / MANIFEST)
    sync_directory(draft)
    return manifest


def _write_for_transformers(folder: Path, spec: TrainSpec, state: dict[str, torch.Tensor]) -> list[str]:
    """Write the folder `transformers` and return its files; none if our own code there lacks a kind of layer."""
    longest = max(spec.tokens.seq_lens)
    tokenizer, dtype = Path(spec.tokens.tokenizer), DTYPES[spec.exporting.dtype]
    architecture, why_not = native(spec.model)
    if architecture is not None and (lost := without_place(architecture, spec.model, state)):
        why_not, architecture = f"{architecture.model_type} has no {lost}", None
    if architecture is not None:
        config, named = architecture.config(spec.model, longest), tensors(architecture, spec.model, state, dtype)
        files = write_folder(folder, config, named, tokenizer, dtype=dtype)
    elif missing := own.misfit(spec.model):
        log.warning("the export has no folder for transformers: %s", missing)
        return []
    else:
        log.info("transformers has no such model (%s); the folder contains its code", why_not)
        config, named = own.config(spec.model, longest), own_tensors(state, dtype)
        files = write_folder(folder, config, named, tokenizer, dtype=dtype, code=own.CODE)
    return [f"{folder.name}/{name}" for name in files]


def model_card(run: Run, manifest: dict[str, Any]) -> str:
    """README.md of the export. Evaluation numbers are those of the same checkpoint, or none."""
    evaluation = run.evaluation
    if evaluation is not None and evaluation["checkpoint_digest"] != manifest["checkpoint_digest"]:
        evaluation = None
    environment = Environment(loader=PackageLoader("trainer", "report"), undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("model_card.md.j2")
    scores = evaluation or {}
    benchmarks = {"benchmarks": rows(scores), "limited": limited(scores), "judged": judged_by(scores)}
    return template.render(run=run, manifest=manifest, evaluation=evaluation, **benchmarks)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _damaged(path, "is not a JSON object")
    return value


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"exported model: {path} {what}; export the run again")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
