"""Refuse jobs that exceed this machine's disk, memory or time before anything is downloaded. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from manifests.spec import BYTES_PER_TOKEN, DOWNLOAD_MARGIN, JobSpec
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.memory import refuse_too_large
from trainer.checkpoints.checkpoint import latest_step
from trainer.data.manifest import read_manifest
from trainer.errors import DataError, SpecError, VolumeError
from trainer.megatron.program import find_program
from trainer.preflight.measured import gibibytes
from trainer.preflight.storage import checkpoints_to_come, exports_to_come
from trainer.process.hostmemory import limit_bytes

TOKEN_BYTES = 2  # for vocabularies below 65,536
FLOPS_PER_CORE = 2e10  # per server core, FP32, measured in this trainer: `tiny` on two cores
MOST_DAYS = 60
DEVICES = Path("/dev")
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # CUDA, ROCm, a GPU under WSL


def checks(job: JobSpec, *, train: bool) -> dict[str, Callable[[], None]]:
    """The checks of this machine, by name; estimates are made in the job's favour.

    Each raises if the job cannot work here:
        SpecError: Megatron-LM is wanted and not installed; the model's state exceeds the memory, or the CPUs would
            take months, which train.runtime.device cpu overrides.
        VolumeError: a volume has too little space for the remaining data and checkpoints.

    Args:
        train: also check what follows the data steps.
    """
    found: dict[str, Callable[[], None]] = {}
    if train:
        found["engine"] = partial(_refuse_absent_engine, job)
        # First what says that there is no GPU, as that is the reason for both.
        found["time"], found["memory"] = partial(_refuse_months, job), partial(_refuse_too_little_memory, job)
    found["disk"] = partial(_refuse_too_little_disk, job, train)
    return found


def refuse_hopeless(job: JobSpec, *, train: bool) -> None:
    """Raise the error of the first failing check of `checks`."""
    for check in checks(job, train=train).values():
        check()


def _trains_without_gpu(job: JobSpec) -> bool:
    device = job.train.runtime.device
    return device == "cpu" or (device == "auto" and not has_gpu())


def _refuse_absent_engine(job: JobSpec) -> None:
    if job.train.engine == "megatron" and latest_step(job.run_dir) < job.train.steps:
        find_program()


def _refuse_too_little_memory(job: JobSpec) -> None:
    if _trains_without_gpu(job) and job.train.engine == "yaongi":
        each = limit_bytes() // job.cluster.ranks_per_node
        refuse_too_large(job.train_spec(), job.layout(), each, "which, without a GPU,")


def _refuse_months(job: JobSpec) -> None:
    if job.train.runtime.device == "cpu" or not _trains_without_gpu(job):
        return
    spec, cores = job.train_spec(), len(os.sched_getaffinity(0))
    flops = flops_per_token(spec.model, spec.tokens.seq_len) * spec.steps * spec.batch.tokens_per_step
    days = flops / (FLOPS_PER_CORE * cores) / 86_400
    if days > MOST_DAYS:
        raise SpecError(
            f"train: {spec.steps:,} steps of this model take about {days:,.0f} days on {cores} cores without a "
            "GPU; use a GPU or a cluster, fewer steps, or the preset tiny or small; to insist, write "
            "train.runtime.device: cpu"
        )


def has_gpu() -> bool:
    return any(any(DEVICES.glob(name)) for name in GPU_DEVICES)


def _refuse_too_little_disk(job: JobSpec, train: bool) -> None:
    wanted = {Path(job.storage.datasets_dir): _data_to_come(job)}
    if train:
        directory, spec = Path(job.run_dir), job.train_spec()
        number, size = checkpoints_to_come(spec, directory)
        wanted[directory] = number * size + exports_to_come(spec, directory)
    volumes: dict[int, tuple[Path, float, float]] = {}
    exporting = ", or raise train.checkpoint.every_steps, as each checkpoint is exported"
    exporting *= job.train.exporting.checkpoints
    for directory, needed in wanted.items():
        place = next(path for path in (directory, *directory.parents) if path.exists())
        status = os.statvfs(place)
        free = status.f_bavail * status.f_frsize if status.f_blocks else float("inf")  # unknown on some machines
        first, before, _ = volumes.get(place.stat().st_dev, (directory, 0.0, free))
        volumes[place.stat().st_dev] = (first, before + needed, free)
    for directory, needed, free in volumes.values():
        if needed > free:
            raise VolumeError(
                f"{directory} has {gibibytes(free)} free, the job needs about {gibibytes(needed)} there; free space, "
                "enlarge the volume, or lower data.max_bytes_per_source, train.steps or train.checkpoint.keep_last"
                + exporting
            )


def _data_to_come(job: JobSpec) -> float:
    """Bytes of text and token files still to be written."""
    factors: dict[Literal["raw", "shards"], float] = {"raw": 1.0, "shards": TOKEN_BYTES / BYTES_PER_TOKEN}
    return sum(factor * _text_to_come(job, stage) for stage, factor in factors.items())


def _text_to_come(job: JobSpec, stage: Literal["raw", "shards"]) -> float:
    """Bytes of text that a stage still lacks."""
    try:
        there = read_manifest(job.stage_dir(stage), stage)
    except DataError:
        there = None
    wanted = {name: (job.byte_budget(name) or 0) / DOWNLOAD_MARGIN for name in job.data.sources}
    return sum(max(0.0, size - (there.counts(name).text_bytes if there else 0)) for name, size in wanted.items())
