"""Export a dense decoder (attention and MLPs) as ONNX, for onnxruntime and other runtimes; FP32.

One graph with a cache, with the names of Hugging Face Optimum; without a cache, the past has length 0:

    input_ids                    int64 [B, T], the new tokens
    attention_mask               int64 [B, S], 1 for cached and new tokens, 0 for padding on either side; S = past + T
    past_key_values.N.key        fp32 [B, K, past, W], and the same for values; N counts layers with attention
    logits                       fp32 [B, T, V]
    present.N.key                fp32 [B, K, S, W], the past of the next call

The weights are in model.onnx.data, because a file of protobuf holds at most 2 GB. The computation is that of
trainer/hf/mixers_yaongi.py; torch's exporter translates it.

Legend: B rows, T new positions, S cached and new positions, D hidden, V vocabulary, K key/value heads, W head width.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.data.tokenizer import files_of
from trainer.errors import LaunchError, SpecError
from trainer.export import MANIFEST, TRANSFORMERS, read
from trainer.files import checksum, new_directory
from trainer.hf import own
from trainer.hf.folder import CONFIG
from trainer.hf.mixers_yaongi import MIXERS, Attention, RMSNorm, State, Step, rotary
from trainer.modelspec import ModelSpec
from trainer.passport import PASSPORT
from trainer.pretrained import MTP, find, refuse_quantised

log = logging.getLogger(__name__)

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript")
SYMBOLS = frozenset("*-")
EXAMPLE = (2, 3, 5)  # B, T, past of the traced call; the exporter would take a size of 0 or 1 as fixed


def run(directory: Path, output: Path) -> Path:
    """Write an exported model as ONNX, with its tokenizer, to the folder `output`; returns the graph's file.

    The folder appears when it is complete; an earlier ONNX export there is replaced.

    Raises:
        SpecError: the model has kinds of layers that cannot be exported, or `output` cannot be used.
        LaunchError: a package is missing.
        CheckpointError: the export is damaged.
    """
    refuse(find(directory).model, directory)
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise LaunchError(f"ONNX needs the package {missing[0]}, which is not installed: pip install 'yaongi[onnx]'")
    if output.resolve().is_relative_to(directory.resolve()):
        raise SpecError(f"{output} is inside the export, which would no longer verify; give another folder")
    if output.exists() and not (output / FILE).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise SpecError(f"{output} exists and is not an ONNX export; give another folder, or remove it")
    manifest, spec = read(directory)
    refuse_quantised(directory, manifest, "ONNX is written from")
    with new_directory(output) as draft:
        _write(draft, directory, manifest, spec)
    return output / FILE


def refuse(spec: ModelSpec, where: object) -> None:
    """
    Raises:
        SpecError: the model has kinds of layers that cannot be exported.
    """
    unknown = sorted({section.label for _, section in spec.trunk() if section.symbol not in SYMBOLS})
    if unknown:
        raise SpecError(
            f"{where}: a model with {' and '.join(unknown)} cannot be written as ONNX, only decoders of attention and "
            "MLP, such as the preset dual-h100-dense; use the export itself, or its folder for transformers"
        )
    if not any("*" in layer for layer in spec.layers):
        raise SpecError(f"{where}: a model without attention cannot be written as ONNX; use the export itself")


class Decoder(nn.Module):
    """The model under the parameter names of an export, with the cache as tensors."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        sections = own.config(spec, 0)
        config: Any = SimpleNamespace(**sections)
        self.attention, self.factor = sections["attention"], 1.0
        if spec.mup:
            self.factor = spec.mup.base_hidden / spec.hidden
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "norm": RMSNorm(spec.hidden, spec.norm_eps),
                        "mixer": MIXERS[symbol][1](config, sections[MIXERS[symbol][0]]),
                    }
                )
                for symbol in layer
            )
            for layer in spec.layers
        )
        self.final_norm = RMSNorm(spec.hidden, spec.norm_eps)
        self.head = nn.Linear(spec.hidden, spec.vocab_size, bias=False)
        if spec.tied_embedding:
            self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, T, V] of the token after each new position, and keys and values [B, K, S, W] of all positions."""
        step = self._step(input_ids, attention_mask, past_key_values[0][0].shape[2])
        present, past = [], iter(past_key_values)
        x_BTD = self.embedding(input_ids)
        for layer in self.layers:
            for sublayer in layer:
                state = State()
                if isinstance(sublayer["mixer"], Attention):
                    key_BKSW, value_BKSW = next(past)
                    state |= {"k": key_BKSW.transpose(1, 2), "v": value_BKSW.transpose(1, 2)}
                x_BTD = x_BTD + sublayer["mixer"](sublayer["norm"](x_BTD), step, state)
                if state:
                    present.append((state["k"].transpose(1, 2), state["v"].transpose(1, 2)))
        return self.head(self.final_norm(x_BTD) * self.factor), present

    def _step(self, ids_BT: Tensor, mask_BS: Tensor, past: int) -> Step:
        seen_BS, index_S = mask_BS.bool(), torch.arange(mask_BS.shape[1], device=ids_BT.device)
        index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) + past
        itself_TS = index_T[:, None] == index_S  # also for padding: a softmax over nothing is NaN
        earlier_TS = index_T[:, None] > index_S
        allowed_B1TS = (itself_TS | (earlier_TS & seen_BS[:, None]))[:, None]
        turn_BT1W = None
        if self.attention["rope_theta"] is not None:
            turn_BT1W = rotary(self.attention, (mask_BS.cumsum(1).index_select(1, index_T) - 1).clamp(min=0))
        return Step(ids_BT, None, allowed_B1TS, turn_BT1W)


def _write(folder: Path, directory: Path, manifest: dict[str, Any], spec: ModelSpec) -> None:
    import onnx

    program = _translated(_decoder(directory, spec), spec)
    program.model.metadata_props.update(_origin(directory, manifest))
    program.save(folder / FILE, external_data=True)
    onnx.checker.check_model(folder / FILE)
    native = directory / TRANSFORMERS
    if native.is_dir():
        beside = [file for file in native.iterdir() if ".safetensors" not in file.name and file.suffix != ".py"]
    else:
        beside = files_of(directory)
    for file in beside:
        shutil.copyfile(file, folder / file.name)
    if (config := folder / CONFIG).is_file():
        value = json.loads(config.read_bytes())
        if manifest.get("trust_remote_code"):  # other programs do not know this architecture
            config.unlink()
        else:
            config.write_text(json.dumps(value | {"dtype": "float32"}, indent=1) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        shutil.copymode(directory / MANIFEST, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())
    log.info("wrote %d parameters as ONNX", manifest["parameters"])


def _decoder(directory: Path, spec: ModelSpec) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(spec)
    state = load_file(directory / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(MTP)}
    if spec.tied_embedding:
        state["head.weight"] = state["embedding.weight"]
    decoder.load_state_dict(state, assign=True)
    if spec.tied_embedding:
        decoder.head.weight = decoder.embedding.weight
    return decoder.eval()


def _translated(decoder: Decoder, spec: ModelSpec) -> Any:
    """The torch.onnx.ONNXProgram."""
    assert spec.attention is not None
    rows, length, past = EXAMPLE
    layers = range(sum(layer.count("*") for layer in spec.layers))
    shape = (rows, spec.attention.num_kv_heads, past, spec.attention.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in layers]
    ids = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones(rows, past + length, dtype=torch.int64)
    cached = {0: "batch_size", 2: "past_sequence_length"}
    with _quiet():
        return torch.onnx.export(
            decoder,
            (ids, mask, caches),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask", *_names("past_key_values", layers)],
            output_names=["logits", *_names("present", layers)],
            dynamic_shapes=(
                {0: "batch_size", 1: "sequence_length"},
                {0: "batch_size", 1: "total_sequence_length"},
                [(cached, cached) for _ in layers],
            ),
        )


def _names(prefix: str, layers: range) -> list[str]:
    return [f"{prefix}.{layer}.{what}" for layer in layers for what in ("key", "value")]


def _origin(directory: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Where the graph comes from, for its metadata."""
    found = {name: str(manifest[name]) for name in ("name", "step", "checkpoint_digest", "code_version")}
    if (passport := directory / PASSPORT).is_file():
        found["passport_sha256"] = checksum(passport, "sha256")
    return {f"yaongi.{name}": value for name, value in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which are about packages and names of its own."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
