"""A folder that transformers' AutoModelForCausalLM and AutoTokenizer load, of a model that is one of theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.tokenizer import Tokenizer
from trainer.hf.architectures import Architecture
from trainer.hf.weights import INDEX, SINGLE, tensors
from trainer.modelspec import ModelSpec

FILE_BYTES = 5 * 10**9  # of weights in one file
CONFIG, GENERATION = "config.json", "generation_config.json"


def write(
    folder: Path,
    architecture: Architecture,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    tokenizer_files: Sequence[Path],
    *,
    max_length: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Write configuration, weights and tokenizer; the names of the files.

    Args:
        state: a whole model's. What multi-token prediction has beside it is left out.
        max_length: tokens of the rows that it was trained on.
    """
    folder.mkdir()
    tokenizer = Tokenizer.load(tokenizer_files[0].parent)
    names = {"eos_token_id": tokenizer.eod_id, "bos_token_id": None, "pad_token_id": tokenizer.eod_id}
    config = architecture.config(spec, max_length) | names | {"dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, {**names, "do_sample": True, "temperature": 0.8})
    written = [CONFIG, GENERATION, *_write_weights(folder, tensors(architecture, spec, state, dtype))]
    for file in tokenizer_files:
        shutil.copyfile(file, folder / file.name)
        written.append(file.name)
    return written


def _write_weights(folder: Path, named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """One file, or several and their index; at most one file's tensors are in memory at a time."""
    files: list[str] = []
    total = 0
    where: dict[str, str] = {}  # tensor → file
    for number, part in enumerate(_in_files(named), start=1):
        files.append(f"model-{number:05}.safetensors")
        save_file(part, folder / files[-1], metadata={"format": "pt"})
        where |= dict.fromkeys(part, files[-1])
        total += sum(tensor.nbytes for tensor in part.values())
    if len(files) == 1:
        (folder / files[0]).rename(folder / SINGLE)
        shutil.copymode(folder / CONFIG, folder / SINGLE)  # safetensors ignores the umask
        return [SINGLE]
    final = {name: f"model-{number:05}-of-{len(files):05}.safetensors" for number, name in enumerate(files, start=1)}
    for name, last in final.items():
        (folder / name).rename(folder / last)
        shutil.copymode(folder / CONFIG, folder / last)
    _write_json(
        folder / INDEX, {"metadata": {"total_size": total}, "weight_map": {k: final[v] for k, v in where.items()}}
    )
    return [*final.values(), INDEX]


def _in_files(named: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if part and size + tensor.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.contiguous()
        size += tensor.nbytes
    yield part


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
