"""A folder that transformers' AutoModelForCausalLM and AutoTokenizer load: configuration, weights, tokenizer, and the
code of models that transformers does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.chat import CHATML
from trainer.data.chattemplate import FILE as CHAT
from trainer.data.chattemplate import has_template
from trainer.data.tokenizer import Tokenizer, files_of
from trainer.hf.files import INDEX, SINGLE

FILE_BYTES = 5 * 10**9  # of weights in one file
CONFIG, GENERATION = "config.json", "generation_config.json"


def write(
    folder: Path,
    config: dict[str, Any],
    named: Iterable[tuple[str, Tensor]],
    tokenizer_dir: Path,
    *,
    dtype: torch.dtype,
    code: Sequence[Path] = (),
) -> list[str]:
    """Write the folder and return the names of its files.

    Args:
        config: the configuration of the architecture, without dtype and tokens.
        named: the weights, under the names in the files.
        dtype: the dtype of most weights.
        code: files for transformers to import, if it does not have the model itself.
    """
    folder.mkdir()
    tokenizer = Tokenizer.load(tokenizer_dir)
    begin = tokenizer.prefix[0] if tokenizer.prefix else None
    tokens = {"eos_token_id": tokenizer.eod_id, "bos_token_id": begin, "pad_token_id": tokenizer.eod_id}
    _write_json(folder / CONFIG, config | tokens | {"dtype": str(dtype).removeprefix("torch.")})
    written = [CONFIG, *_write_weights(folder, named)]
    for file in (*files_of(tokenizer_dir), *code):
        shutil.copyfile(file, folder / file.name)
        written.append(file.name)
    if GENERATION not in written:
        turn = tokenizer.markup.get(CHATML.end)
        ends = tokenizer.eod_id if turn is None else [tokenizer.eod_id, turn]
        _write_json(folder / GENERATION, {**tokens, "eos_token_id": ends, "do_sample": True, "temperature": 0.8})
        written.append(GENERATION)
    if tokenizer.is_own and not has_template(tokenizer_dir):
        shutil.copyfile(Path(__file__).with_name(CHAT), folder / CHAT)
        written.append(CHAT)
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
