"""What GPUs can do at most: dense matrix products and memory traffic. The one table of peaks. Imports no torch.

Peaks are the vendor's, without sparsity and with FP32 sums: NVIDIA's data sheets of each product (a sheet that gives a
figure "with sparsity" gives twice the dense one), of GeForce cards the appendix of the architecture's white paper.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from trainer.errors import SpecError


class Gpu(NamedTuple):
    """FLOP/s, bytes/s and memory of one GPU.

    Attributes:
        name: in options.
        words: that all are part of the device's name in CUDA.
        flops: dense BF16 (of a T4, which has none: FP16).
        fp8_flops: None without FP8 products.
        bandwidth: of its memory.
        memory_gib: what the vendor calls GB; CUDA reports about as many GiB.
    """

    name: str
    words: frozenset[str]
    flops: float
    fp8_flops: float | None
    bandwidth: float
    memory_gib: int


def _gpu(name: str, words: str, flops: float, fp8_flops: float | None, bandwidth: float, memory_gib: int) -> Gpu:
    fp8_peak = None if fp8_flops is None else fp8_flops * 1e12
    return Gpu(name, frozenset(words.split()), flops * 1e12, fp8_peak, bandwidth, memory_gib)


# Of two with the same word in their names, the one with more words comes first.
GPUS = (
    _gpu("h100-pcie", "H100 PCIe", 756, 1513, 2.0e12, 80),
    _gpu("h100-nvl", "H100 NVL", 835, 1671, 3.9e12, 94),
    _gpu("h100", "H100", 989, 1979, 3.35e12, 80),  # SXM
    _gpu("h200", "H200", 989, 1979, 4.8e12, 141),
    _gpu("gh200", "GH200", 989, 1979, 4.0e12, 96),
    _gpu("b200", "B200", 2250, 4500, 8.0e12, 180),
    _gpu("a100-40", "A100 40GB", 312, None, 1.555e12, 40),
    _gpu("a100", "A100", 312, None, 2.039e12, 80),  # 80 GB
    _gpu("l40s", "L40S", 362, 733, 0.864e12, 48),
    _gpu("l4", "L4", 121, 242, 0.3e12, 24),
    _gpu("rtx-4090", "RTX 4090", 165.2, 330.3, 1.008e12, 24),
    _gpu("rtx-5090", "RTX 5090", 209.5, 419, 1.792e12, 32),
    _gpu("t4", "T4", 65, None, 0.32e12, 16),
)


def by_option(name: str) -> Gpu:
    """Raises SpecError for a name that is not in the table."""
    wanted = name.lower().replace(" ", "-").replace("_", "-")
    for gpu in GPUS:
        if gpu.name == wanted:
            return gpu
    raise SpecError(f"--gpu {name}: not known; known are {', '.join(gpu.name for gpu in GPUS)}")


def by_device(name: str) -> Gpu | None:
    """The GPU that CUDA names so; None if it is not in the table."""
    words = set(re.split(r"[ \-]+", name))
    return next((gpu for gpu in GPUS if gpu.words <= words), None)
