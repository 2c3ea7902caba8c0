"""Check a node's GPUs before a process uses them: their number, and a driver that fits PyTorch.

Imports torch only inside functions, and makes no CUDA context: the process that asks lives as long as the ranks do, and
a context holds hundreds of megabytes of each GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import TYPE_CHECKING

from trainer.errors import GpuError, SpecError
from trainer.preflight.measured import Measured, gibibytes

if TYPE_CHECKING:
    import torch

MIN_FREE_SHARE = 0.8  # of a GPU's memory before training; more than this is held by another process
_SIDE, _ROUNDS = 1024, 8
# Fields of nvidia-smi --query-gpu that tell of a failing GPU, with what is to be done. Xid errors are in the kernel log
# of the node only, which a container may not read.
_HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded; reset the GPU",
    "retired_pages.pending": "memory pages that wait to be retired; reset the GPU",
}


def visible(device: str) -> Measured:
    """Count the GPUs that torch would use, and compare the driver with it; warn of errors that the driver has counted.

    Args:
        device: RuntimeSpec.device.

    Raises:
        SpecError: no driver, or one too old.
        GpuError: fewer GPUs than processes.
    """
    if device == "cpu":
        return Measured()
    import torch

    found = torch.cuda.device_count()
    if not found and device == "auto":
        return Measured("no GPU")
    if reason := driver_mismatch(torch.version.cuda, driver_cuda_version()):
        raise SpecError(reason)
    asked = os.environ.get("PET_NPROC_PER_NODE", "")
    expected = int(asked) if asked.isdecimal() else max(1, found)
    if found < expected:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise GpuError(
            f"{found} of {expected} GPUs are visible{f' (CUDA_VISIBLE_DEVICES={shown})' if shown else ''}; one has "
            "fallen off the bus or the container was given fewer: see nvidia-smi on the node, then drain or reset it",
        )
    return Measured(f"{found} GPUs", warning=health())


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports, (13, 0) say; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def driver_mismatch(torch_cuda: str | None, driver: tuple[int, int] | None) -> str | None:
    """Why torch cannot use this driver; None if it can.

    A driver runs programs of any minor version of its own CUDA major version, and of older ones (CUDA's minor version
    compatibility); an image with NVIDIA's forward compatibility package brings a library that says so itself.
    """
    if torch_cuda is None:
        return "this torch is built without CUDA; use an image or a wheel with it, or write train.runtime.device: cpu"
    if driver is None:
        return (
            "there is no NVIDIA driver here (libcuda.so.1); run on a GPU node, in a container that asks for GPUs "
            "(cluster.gpus_per_node), or write train.runtime.device: cpu"
        )
    if driver[0] < int(torch_cuda.split(".")[0]):
        return (
            f"the driver supports CUDA {driver[0]}.{driver[1]} and is too old for this torch, built for CUDA "
            f"{torch_cuda}; update the driver of the node, or use an image whose torch is built for CUDA {driver[0]}"
        )
    return None


def health() -> str | None:
    """What nvidia-smi, which needs no rights for that, says of failing memory; None if nothing, or without it."""
    command = ["nvidia-smi", f"--query-gpu=index,uuid,{','.join(_HEALTH)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    found = []
    for index, uuid, *values in (map(str.strip, line.split(",")) for line in lines):
        for value, meaning in zip(values, _HEALTH.values(), strict=True):
            if value.lower() not in ("0", "no") and not value.startswith("["):  # "[N/A]": the GPU does not count them
                found.append(f"GPU {index} ({uuid}): {value} {meaning}")
    return "; ".join(found) or None


def computes(device: torch.device) -> Measured:
    """Look at the free memory of a rank's GPU and multiply matrices of whole numbers, whose products are exact.

    Raises:
        GpuError: a product is wrong.
    """
    import torch

    warning = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < MIN_FREE_SHARE * total:
            warning = (
                f"GPU {device.index} has {gibibytes(free)} of {gibibytes(total)} free; another process holds the rest: "
                "see nvidia-smi on the node and end it, or drain the node"
            )
    generator = torch.Generator().manual_seed(0)
    # Sums of 1024 products of at most 64 are below 2^24 and so exact in FP32, and TF32 holds the factors exactly.
    a, b = (torch.randint(-8, 9, (_SIDE, _SIDE), generator=generator).float() for _ in range(2))
    expected = (a.double() @ b.double()).float().to(device)
    a, b = a.to(device), b.to(device)
    for _ in range(_ROUNDS):
        wrong = int((a @ b != expected).sum())
        if wrong:
            raise GpuError(
                f"{device} computes wrong numbers: {wrong} of {_SIDE**2} elements of a matrix product differ from the "
                "CPU's; drain the node and have the GPU tested",
            )
    return Measured(warning=warning)
