"""Check a node's volumes and shared memory: access, size and speed. Imports no torch."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from trainer import exported
from trainer.arithmetic.memory import training_memory
from trainer.checkpoints.checkpoint import MEGATRON_FOLDER, published, unfinished
from trainer.data.manifest import read_manifest
from trainer.errors import SpecError, VolumeError
from trainer.files import sync_directory
from trainer.parameters import parameters
from trainer.preflight.measured import GIB, MB, Measured, gibibytes, megabytes
from trainer.spec import TokensSpec, TrainSpec

SHARED_MEMORY = Path("/dev/shm")
READ_BYTES, WRITE_BYTES = 64 * 2**20, 16 * 2**20
PATIENCE_SECONDS = 2.0  # then the amount moved so far is measured
SLOW_MB_PER_SECOND = 10.0  # warned of where the spec names no floor
JUDGED_BYTES = 4 * 2**20  # of less, the time says more about opening files than about the volume
MEGATRON_BYTES = 2 + 3 * 4  # of a weight in one of its checkpoints
_CHUNK = 2**20


def readable(tokens: TokensSpec, floor_mb_per_second: float | None) -> Measured:
    """Read some of the shards, from the volume rather than from the page cache.

    Raises:
        DataError: there are none.
        VolumeError: they cannot be read, or more slowly than the spec demands.
    """
    directory = Path(tokens.shards)
    files = read_manifest(directory, "shards").files
    tokens_files = [entry for entry in files if entry.path.endswith(".bin") and entry.split == "train"]
    count, began = 0, time.monotonic()
    for entry in sorted(tokens_files, key=lambda entry: -entry.bytes):
        file = directory / entry.path
        try:
            count += _read(file, READ_BYTES - count, began + PATIENCE_SECONDS)
        except OSError as error:
            raise VolumeError(f"{file}: {error.strerror}; fix the datasets volume or the permissions on it") from None
        if count >= READ_BYTES or time.monotonic() > began + PATIENCE_SECONDS:
            break
    rate = count / max(time.monotonic() - began, 1e-6)
    floor = "train.runtime.preflight.min_read_mb_per_second"
    warning = _judged(f"{directory} is read at", rate, count, floor_mb_per_second, floor)
    return Measured(f"datasets {megabytes(rate)}", rate, warning)


def writable(spec: TrainSpec, floor_mb_per_second: float | None) -> Measured:
    """Write, sync, rename, read back and remove a file where the checkpoints go, and look at the free space.

    Raises:
        VolumeError: any of that is impossible, too slow by the spec's own floor, or the space too little.
    """
    directory = Path(spec.run_dir)
    # A container's processes have the same numbers each time, so what a killed start leaves behind is overwritten.
    draft = directory / f".preflight-{socket.gethostname()}-{os.getpid()}.draft"
    final = draft.with_suffix("")
    block = os.urandom(_CHUNK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        began, count = time.monotonic(), 0
        with draft.open("wb", buffering=0) as stream:
            while count < WRITE_BYTES and time.monotonic() < began + PATIENCE_SECONDS:
                count += stream.write(block)
            os.fsync(stream.fileno())
        rate = count / max(time.monotonic() - began, 1e-6)
        draft.replace(final)
        sync_directory(directory)
        with final.open("rb") as stream:
            _drop_cached(stream.fileno())
            same = all(part == block[: len(part)] for part in iter(lambda: stream.read(_CHUNK), b""))
    except OSError as error:
        raise VolumeError(
            f"{directory} cannot take checkpoints ({error.strerror}); free space there, or fix its permissions: "
            f"it must be writable for uid {os.getuid()}",
        ) from None
    finally:
        _remove(draft, final)
    if not same:
        raise VolumeError(f"{directory} gives back other bytes than were written; use another volume")
    free = _free(spec, directory)
    floor = "train.runtime.preflight.min_write_mb_per_second"
    warning = _judged(f"{directory} is written at", rate, count, floor_mb_per_second, floor)
    return Measured(f"checkpoints {megabytes(rate)}, {gibibytes(free)} free", rate, warning)


def shared_memory(minimum_gib: float | None, path: Path = SHARED_MEMORY) -> Measured:
    """Compare the size of /dev/shm, through which NCCL and worker processes talk, with what the job asks for.

    Raises:
        SpecError: it is smaller.
    """
    try:
        size = _size(path)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}; mount a memory volume there") from None
    if minimum_gib is not None and size < 0.99 * minimum_gib * GIB:  # the kernel rounds to pages
        raise SpecError(
            f"{path} has {gibibytes(size)}, the job asks for {minimum_gib:g} GiB; mount an emptyDir of medium Memory "
            "there with that sizeLimit, below the memory limit of the container (docker: --shm-size), or lower "
            "cluster.shared_memory_gib",
        )
    return Measured(f"shared memory {gibibytes(size)}")


def _free(spec: TrainSpec, directory: Path) -> float:
    """Free bytes of the checkpoint volume; enough for what the run is going to keep there besides what it has."""
    (missing, size), exports = checkpoints_to_come(spec, directory), exports_to_come(spec, directory)
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize + _leftover(directory)
    needed = missing * size + exports
    if status.f_blocks and free < needed:  # some network file systems do not tell
        beside = f", and {gibibytes(exports)} of exports" if exports else ""
        remedy = "raise train.checkpoint.every_steps" if exports else "lower train.checkpoint.keep_last"
        raise VolumeError(
            f"{directory} has {gibibytes(free)} free, the run needs {gibibytes(needed)} ({missing} checkpoints "
            f"of {gibibytes(size)}{beside}); free space, enlarge the volume, or {remedy}",
        )
    return free


def checkpoints_to_come(spec: TrainSpec, directory: Path) -> tuple[int, int]:
    """(number, bytes of each) of the checkpoints for which a run will need room beside those that it has."""
    memory = training_memory(spec.model, spec.optimizer)
    # A new checkpoint is complete before the oldest goes, and the newest from before the decay stays.
    planned = -(-spec.steps // spec.checkpoint.every_steps)
    most = spec.checkpoint.keep_last + 1 + (spec.decay_begins < spec.steps)
    if spec.engine == "megatron":  # BF16 weights, FP32 ones and two moments; the last one in FP32 is of a third
        size = MEGATRON_BYTES * sum(parameter.count for parameter in parameters(spec.model))
        return max(1, min(most, planned) - len(list((directory / MEGATRON_FOLDER).glob("iter_*")))), size
    return max(1, min(most, planned) - len(published(directory))), memory.weights + memory.optimizer


def exports_to_come(spec: TrainSpec, directory: Path) -> int:
    """Bytes of the exports that a run will make during training beside those that it has.

    Each holds the weights twice: in FP32, and for transformers in the dtype of train.export.
    """
    wanted = spec.exporting
    number = wanted.initial + wanted.checkpoints * -(-spec.steps // spec.checkpoint.every_steps)
    parameter_bytes = 4 + {"bf16": 2, "fp32": 4}[wanted.dtype]
    count = sum(parameter.count for parameter in parameters(spec.model))
    return max(0, number - len(exported.steps(directory))) * parameter_bytes * count


def _leftover(directory: Path) -> int:
    """Bytes of checkpoints that were not finished; the ranks remove them before they save."""
    total = 0
    for path in unfinished(directory):
        for file in path.rglob("*"):
            try:
                total += file.stat().st_size
            except OSError:  # deleted in the meantime
                continue
    return total


def _judged(what: str, rate: float, count: int, floor_mb: float | None, field: str) -> str | None:
    if count < JUDGED_BYTES or rate >= (floor_mb or SLOW_MB_PER_SECOND) * MB:
        return None
    text = f"{what} {rate / MB:.1f} MB/s, "
    if floor_mb is None:
        return f"{text}less than {SLOW_MB_PER_SECOND:g}; training may wait for it, look at the volume"
    raise VolumeError(f"{text}the floor is {floor_mb:g}; use a faster volume or lower {field}")


def _read(file: Path, most: int, deadline: float) -> int:
    count = 0
    with file.open("rb", buffering=0) as stream:
        _drop_cached(stream.fileno())
        while count < most and time.monotonic() < deadline and (part := stream.read(min(_CHUNK, most - count))):
            count += len(part)
    return count


def _drop_cached(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _size(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _remove(*files: Path) -> None:
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            continue  # the check has failed for the same reason already
