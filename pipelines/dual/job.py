"""From the flags of `yaongi dual` to changes of the preset: all that makes it different from `yaongi local PRESET`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.paths import whole
from manifests.spec import preset
from pipelines.dual.dataset import Dataset
from trainer.errors import SpecError
from trainer.specbase import deep_merge

PRESET, SAMPLE_OF = "dual-h100-dense", "tiny"
TEST_STEPS = 10
GPUS = 2  # at most, unless --num-gpus says more
SMALL_TEXT_BYTES = 100_000_000  # of less text more is held out for evaluation, or there would be hardly any
# On CPUs the preset's kind of model, with less of everything: 1.4M parameters, steps of a second.
ON_CPUS: dict[str, Any] = {
    "tokenizer": {"vocab_size": 4096},
    "shards": {"unit_bytes": 524288, "max_shard_bytes": 8388608, "workers": 2},
    "train": {
        "steps": 120,
        "seq_len": 256,
        "model": {
            "vocab_size": 4096,
            "hidden": 128,
            "layers": ["*-"] * 4,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
            "mlp": {"width": 384},
        },
        "batch": {"tokens_per_step": 4096, "micro_batch_rows": 8},
        "optimizer": {"state_dtype": "fp32", "muon": {"learning_rate": 0.01}, "adamw": {"learning_rate": 0.005}},
        "precision": {"dtype": "auto"},
        "runtime": {"compile": False},
        "evaluate": {"max_tokens": 10000},
    },
    "cluster": {"nodes": 2, "gpus_per_node": 0, "cpus_per_node": 1, "memory_gib_per_node": 3},
}
MOST_ROWS = 64  # of a micro-batch that auto may take
NO_EPOCH_LIMIT = 1e6  # of a test, which may repeat a small dataset


@dataclass(frozen=True)
class Flags:
    """The command line. None: as in the preset. `precision`: "fp16", "fp32" or None."""

    train: bool
    dataset: Dataset
    output_dir: Path
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_seq_length: int | None = None
    save_steps: int = 500
    precision: str | None = None
    compile: bool = True
    num_gpus: int | None = None
    save_initial: bool = True


@dataclass(frozen=True)
class Machine:
    """GPUs of this machine, and the memory of the smallest one in GiB."""

    gpus: int
    gpu_memory_gib: float = 0.0


def ranks(flags: Flags, machine: Machine) -> int:
    """Number of processes: one for each GPU, on a machine without any two.

    Raises:
        SpecError: more GPUs are asked for than there are.
    """
    if flags.num_gpus is not None and flags.num_gpus > machine.gpus:
        has = f"{machine.gpus} GPU{'s' * (machine.gpus != 1)}" if machine.gpus else "no GPU that PyTorch sees"
        fix = f"--num-gpus {machine.gpus}" if machine.gpus else "leave it out to try on the CPU"
        raise SpecError(f"--num-gpus {flags.num_gpus}: this machine has {has}; {fix}; yaongi doctor says more")
    return (flags.num_gpus or min(GPUS, machine.gpus)) if machine.gpus else GPUS


def changes(flags: Flags, machine: Machine) -> dict[str, Any]:
    """The fields that differ from the preset.

    Raises:
        SpecError: as `ranks`.
    """
    number = ranks(flags, machine)
    found: dict[str, Any] = {"name": "dual" if flags.train else "dual-test", "data": _data(flags)}
    if machine.gpus:
        memory = {"gpu_memory_gib": machine.gpu_memory_gib} if machine.gpu_memory_gib else {}
        found |= {"cluster": {"nodes": 1, "gpus_per_node": number, **memory}}
    else:
        found = deep_merge(found, ON_CPUS)
    base = deep_merge(preset(PRESET), found)["train"]
    train: dict[str, Any] = {"checkpoint": {"every_steps": flags.save_steps}}
    if flags.max_steps or not flags.train:
        train["steps"] = flags.max_steps or TEST_STEPS
    if flags.max_seq_length:
        train["seq_len"] = flags.max_seq_length
    train["batch"] = _batch(flags, base, number, machine.gpus)
    if flags.learning_rate:
        train |= _rate(flags.learning_rate, base)
    if flags.precision:
        train["precision"] = {"dtype": flags.precision}
    if not flags.compile:
        train["runtime"] = {"compile": False}
    train["export"] = {
        "initial": flags.save_initial,
        "checkpoints": True,
        "folder": str(whole(flags.output_dir)),
    }
    return deep_merge(found, {"train": train})


def _data(flags: Flags) -> dict[str, Any]:
    """One source of the user's files, or those of the sample corpus, instead of the preset's."""
    sources: dict[str, Any] = dict.fromkeys(preset(PRESET)["data"]["sources"])
    # Those that the preset itself has removed stay away.
    if not flags.dataset.files:
        return {**preset(SAMPLE_OF)["data"], "sources": sources | preset(SAMPLE_OF)["data"]["sources"]}
    paths = [str(file) for file in flags.dataset.files]
    sources["dataset"] = {
        "domain": "ko",
        "weight": 1.0,
        "licence": "as the files' owner states",
        "origin": {"kind": "files", "paths": paths},
    }
    if not flags.train:
        sources["dataset"]["max_epochs"] = NO_EPOCH_LIMIT
    size = sum(file.stat().st_size for file in flags.dataset.files)
    return {"sources": sources, **({"heldout_fraction": 0.02} if size < SMALL_TEXT_BYTES else {})}


def _batch(flags: Flags, base: dict[str, Any], number: int, gpus: int) -> dict[str, Any]:
    """Rows of a micro-batch, on GPUs as many as fit; about the preset's tokens of a step that all ranks can share."""
    rows = flags.batch_size or ("auto" if gpus else base["batch"]["micro_batch_rows"])
    wanted, one = base["batch"]["tokens_per_step"], number * (flags.max_seq_length or base["seq_len"])
    # For auto a multiple of rows that leaves it a choice of micro-batches.
    together = max(1, min(MOST_ROWS, wanted // one)) if rows == "auto" else rows
    rounds = max(1, round(wanted / (together * one)))
    return {"tokens_per_step": rounds * together * one, "micro_batch_rows": rows}


def _rate(rate: float, base: dict[str, Any]) -> dict[str, Any]:
    """The peak rate of the matrices' optimizer; the schedule ends below it."""
    optimizer = base.get("optimizer", {}).get("name", "muon")
    final = base.get("schedule", {}).get("final_learning_rate", 1e-5)
    lower = {"schedule": {"final_learning_rate": rate / 10}} if rate < final else {}
    return {"optimizer": {optimizer: {"learning_rate": rate}}, **lower}


def as_sets(fields: dict[str, Any], above: str = "") -> Iterator[str]:
    """The fields as `--set` takes them."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from as_sets(value, f"{above}{name}.")
        else:
            plain = isinstance(value, str) and value.replace("-", "").isalnum() and not value[0].isdigit()
            yield f"{above}{name}={value if plain else json.dumps(value, ensure_ascii=False)}"
