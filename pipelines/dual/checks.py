"""What `yaongi dual` shows before it starts: the environment, and what the flags have become."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manifests.spec import JobSpec
from pipelines.doctor import machine
from pipelines.doctor.findings import Finding
from pipelines.dual.dataset import Dataset
from pipelines.dual.job import PRESET, Flags, Machine
from trainer.parameters import parameters

EXTRAS = ("train", "data", "cluster")  # of the package, for `yaongi run` on this machine


def this_machine() -> Machine:
    """The GPUs that PyTorch sees."""
    import torch

    memory = [torch.cuda.get_device_properties(n).total_memory / 2**30 for n in range(torch.cuda.device_count())]
    return Machine(len(memory), round(min(memory), 1) if memory else 0.0)


def environment(dataset: Dataset, fields: dict[str, Any], workdir: Path) -> Iterator[Finding]:
    """This machine, its packages, the data, and what `yaongi run` checks for the job."""
    yield from machine.findings(workdir, with_tools=False)
    yield from requirements()
    yield Finding("data", "ok" if dataset.files else "missing", dataset.said)
    yield from machine.of_job(PRESET, fields, workdir)


def requirements() -> Iterator[Finding]:
    """Whether the packages are there that a run on this machine needs."""
    missing = []
    for line in importlib.metadata.requires("yaongi") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra == ['"](\w+)['"]""", marker)
        if extra and extra[1] not in EXTRAS:
            continue
        name = re.split(r"[<>=!~\[ ]", requirement.strip())[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("requirements", "no", f"missing: {', '.join(missing)}", "make setup, or pip install them")
    else:
        yield Finding("requirements", "ok", f"the packages of yaongi[{','.join(EXTRAS)}] are installed")


def summary(flags: Flags, job: JobSpec, gpus: int, console: Console) -> None:
    """The configuration in words."""
    train, ranks = job.train, job.cluster.world_size
    fitted = job.fitted_spec()
    rows, length = fitted.batch.rows, train.seq_len
    rounds = fitted.micro_batches(ranks)
    count = sum(parameter.count for parameter in parameters(train.model))
    where = f"{ranks} GPUs" if ranks > 1 else "1 GPU"
    mode = "training" if flags.train else "test (--train is the real run)"
    lines = {
        "mode": f"{mode}: {train.steps:,} steps, {train.steps * train.batch.tokens_per_step:,} tokens",
        "model": f"{count / 1e6:,.1f}M parameters, {len(train.model.layers)} layers, hidden {train.model.hidden}"
        + ("" if gpus else f"; no GPU: the model of {PRESET} scaled down"),
        "data": flags.dataset.said,
        "ranks": where if gpus else f"{ranks} processes on the CPU",
        "step": f"{train.batch.tokens_per_step:,} tokens: rows of {length:,}, {rows} for each rank at a time, "
        f"{rounds} time{'s' * (rounds > 1)}",
        "optimizer": f"{train.optimizer.name}, peak rate {train.peak_learning_rate:g}",
        "precision": train.precision.dtype,
        "compile": str(train.runtime.compile).lower(),
        "checkpoints": f"every {train.checkpoint.every_steps:,} steps and at the end",
        "output": str(flags.output_dir),
        "run": f"{job.run_name} in {job.run_dir}",
    }
    table = Table(show_header=False, box=None)
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
