"""Export a model again with weights in INT8 or FP8 (trainer/model/quantised.py), and measure what that costs.

The new folder is a complete export (format 2 of trainer/export.py): the same tokenizer and config.json, a manifest and
a passport of its own. Bits per byte and perplexity before and after, as trainer/scoring.py defines them, are measured
on a run's held-out text or on a text file; they are in the manifest, in the passport and in README.md.
"""

from __future__ import annotations

import json
import logging
import shutil
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from trainer import __version__, passport, signing
from trainer.checkpoints.checkpoint import describe_files
from trainer.data.tokenizer import Tokenizer, files_of
from trainer.distributed import pick_device
from trainer.errors import DataError, SpecError
from trainer.export import MANIFEST, QUANTISED_FORMAT, TRANSFORMERS, WEIGHTS, assemble, read, sync, write_text
from trainer.files import checksum, new_directory, read_object, unreadable
from trainer.loading import cast, natural, quantise_state
from trainer.model.hybrid import HybridModel
from trainer.modelspec import ModelSpec
from trainer.ops.quantised import Kind
from trainer.precision import resolve
from trainer.pretrained import refuse_quantised
from trainer.scoring import Score, labelled, nats, pack, score_sources
from trainer.spec import PrecisionSpec, TrainSpec

log = logging.getLogger(__name__)

CARD, FORMER_CARD = "README.md", "README-before.md"
WINDOW, ROWS = 512, 8  # of a text file
TEXT_TOKENS, TEXT_BYTES = 100_000, 2**24  # of it that are scored, and read
DROPPED = ("passport", "transformers", "transformers_dtype", "trust_remote_code")  # from the manifest
Scores = dict[str, dict[str, float | int]]  # by domain, and of "all"
Measure = Callable[[HybridModel, Tokenizer, torch.device], Scores]


@dataclass(frozen=True)
class Made:
    """Scores on the same text, and bytes of model.safetensors, before and after."""

    folder: Path
    before: Scores
    after: Scores
    bytes_before: int
    bytes_after: int


def run(directory: Path, output: Path, kind: Kind, measure: Measure) -> Made:
    """Write an export with weights of low precision to the folder `output`, which appears when it is complete. An
    earlier one there is replaced.

    Raises:
        SpecError: the export is quantised already, or `output` or the signing key cannot be used.
        CheckpointError: the export is damaged, or a weight is not finite.
        DataError: there is no text to measure with.
    """
    if output.resolve().is_relative_to(directory.resolve()):
        raise SpecError(f"{output} is inside the export, which would no longer verify; give another folder")
    if output.exists() and not _is_quantised(output) and not (output.is_dir() and not any(output.iterdir())):
        raise SpecError(f"{output} exists and is no quantised export; give another folder, or remove it")
    signer = signing.signer()
    if signer is not None and not (directory / passport.PASSPORT).is_file():
        raise SpecError(f"{directory} has no passport to sign; export the run again, or unset {signing.VARIABLE}")
    manifest, spec = read(directory)
    refuse_quantised(directory, manifest, "quantising needs")
    tokenizer, plain = Tokenizer.load(directory), load_file(directory / WEIGHTS)
    state = quantise_state(directory, spec, plain, kind)
    before, after = (
        _measured(directory, spec, some, of, tokenizer, measure) for some, of in ((plain, None), (state, kind))
    )
    with new_directory(output) as draft:
        _write(draft, directory, manifest, state, kind, {"before": before, "after": after})
        if signer is not None:
            signing.sign(draft, *passport.read(draft / passport.PASSPORT), signer)
    sizes = ((folder / WEIGHTS).stat().st_size for folder in (directory, output))
    return Made(output, before, after, *sizes)


def on_heldout(spec: TrainSpec) -> Measure:
    """Scores on the held-out text of a run, as in its evaluation."""

    def measure(model: HybridModel, tokenizer: Tokenizer, device: torch.device) -> Scores:
        precision = resolve(PrecisionSpec(dtype="fp32"), None)  # the model's own dtypes, no autocast
        by_domain = score_sources(spec, model, tokenizer, device, precision).by_domain()
        return _summaries(by_domain)

    return measure


def on_text(file: Path) -> Measure:
    """Scores on the first TEXT_TOKENS tokens of a text file, which is one document.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(TEXT_BYTES)
        text = getincrementaldecoder("utf-8")().decode(data, final=len(data) < TEXT_BYTES)  # the end may be cut
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8 text; convert it") from None

    def measure(model: HybridModel, tokenizer: Tokenizer, device: torch.device) -> Scores:
        document = labelled(np.array([*tokenizer.encode(text), tokenizer.eod_id]), None, TEXT_TOKENS)
        scored = document[1]
        score = Score(0.0, len(scored), int(np.array(tokenizer.byte_lengths())[scored].sum()), 1)
        if not score.bytes:
            raise DataError(f"{file}: has no text to score; a token needs one before it")
        with torch.inference_mode():
            score.nats = sum(float(nats(model, batch, device)) for batch in pack([document], WINDOW, ROWS))
        return _summaries({file.name: score})

    return measure


def _summaries(by_domain: Mapping[str, Score]) -> Scores:
    every = dict(by_domain) | {"all": sum(by_domain.values(), Score())}
    return {name: score.summary() for name, score in every.items()}


def _measured(
    directory: Path,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    kind: Kind | None,
    tokenizer: Tokenizer,
    measure: Measure,
) -> Scores:
    device = pick_device("auto")
    stream = natural(device)
    model = assemble(directory, spec, cast(state, stream), device, kind=kind, stream=stream)
    return measure(model, tokenizer, device)


def _is_quantised(folder: Path) -> bool:
    return bool(read_object(folder / MANIFEST).get("weights"))


def _write(
    draft: Path,
    directory: Path,
    source: dict[str, Any],
    state: Mapping[str, torch.Tensor],
    kind: Kind,
    measured: dict[str, Any],
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(directory / MANIFEST, draft / WEIGHTS)  # safetensors ignores the umask
    copied = [directory / "config.json", *files_of(directory)]
    for file in copied:
        shutil.copyfile(file, draft / file.name)
    shutil.copyfile(directory / CARD, draft / FORMER_CARD)
    write_text(draft / CARD, _card(source["name"], kind, measured))
    manifest = {name: value for name, value in source.items() if name not in DROPPED} | {
        "format": QUANTISED_FORMAT,
        "weights": kind,
        "code_version": __version__,
        "tensors": len(state),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "measured": measured,
        "made_from_sha256": checksum(directory / MANIFEST, "sha256"),
    }
    theirs = read_object(directory / TRANSFORMERS / "config.json")
    if longest := theirs.get("max_position_embeddings"):
        manifest["max_position_embeddings"] = longest  # a server's default
    names = sorted((WEIGHTS, *(file.name for file in copied), CARD, FORMER_CARD))
    has_passport = (directory / passport.PASSPORT).is_file()
    if has_passport:
        manifest["passport"] = passport.PASSPORT
    manifest["sha256"] = {name: checksum(draft / name, "sha256") for name in names}
    manifest["files"] = {name: entry.model_dump() for name, entry in describe_files(draft, names).items()}
    write_text(draft / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if has_passport:
        passport.write_quantised(draft, directory, manifest, measured)
    for file in draft.iterdir():
        sync(file)


def rows(before: Scores, after: Scores) -> list[list[str]]:
    """Domain, bits per byte before, after and their difference, perplexity likewise."""
    found = []
    for name, first in before.items():
        row = [name]
        for key in ("bits_per_byte", "perplexity"):
            one, other = first[key], after[name][key]
            row += [f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}"]
        found.append(row)
    return found


def _card(name: str, kind: Kind, measured: dict[str, Any]) -> str:
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows(measured["before"], measured["after"]))
    return f"""---
tags: [yaongi, text-generation]
---
# {name}, weights in {kind.upper()}

The model of [{FORMER_CARD}]({FORMER_CARD}), which states its data and licences, with its large weights in
{kind.upper()} and a scale for each output channel. Only yaongi loads it, as {FORMER_CARD} shows.

| text | bits per byte before | after | difference | perplexity before | after | difference |
|---|---|---|---|---|---|---|
{lines}
"""
