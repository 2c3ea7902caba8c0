"""Print the part of a lock file that an image needs. Hashes remain, so `pip --require-hashes` still checks every file.

    python3 select_requirements.py LOCK [--cpu-only | --compiled]

- If the base image has its own torch, torch and what it was built with are left out: triton, numpy, CUDA libraries.
- So are kernels that the base image has itself: Transformer Engine and flash-attn in NVIDIA's.
- Kernels that only exist as sources are left out too. `--compiled` prints them alone, for a second installation that
  compiles them against the torch of the first one; nothing, where the base image has no nvcc.
- `--cpu-only` leaves out what `import torch` does not link against (0.9 of 5.1 GB): triton, cusolver, nvtx and CUDA's
  Python bindings. Such an image trains only on CPUs; drop_not_loaded.py removes another 0.7 GB.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FROM_BASE = re.compile(r"torch|triton|numpy|(nvidia|cuda)-(?!cutlass-dsl|cudnn-frontend).*")
COMPILED = re.compile(r"causal-conv1d|flash-attn|mamba-ssm|transformer-engine-torch")
NOT_ON_CPU = re.compile(r"triton|nvidia-(cusolver|nvtx)|cuda-(bindings|pathfinder|toolkit)")


def requirements(lock: str) -> Iterator[tuple[str, str]]:
    """Yield (name, requirement with its hashes and comments) in the order of the lock file."""
    for block in re.split(r"\n(?=[A-Za-z0-9])", lock):
        if match := re.match(r"([A-Za-z0-9._-]+)==", block):
            yield match[1], block


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main(lock: str, *flags: str) -> None:
    skip = [FROM_BASE] if installed("torch") else []
    own = (kernels for kernels in ("flash-attn", "transformer-engine") if installed(kernels))
    for kernels in own:
        skip.append(re.compile(rf"{kernels}(-torch|-cu\d+)?"))
        if kernels == "transformer-engine":
            skip.append(re.compile("nvidia-cudnn-frontend"))  # Python of its attention, not a library of torch
    if "--cpu-only" in flags:
        skip.append(NOT_ON_CPU)
    compiled = "--compiled" in flags
    if compiled and shutil.which("nvcc") is None:
        skip.append(COMPILED)
    left_out = []
    for name, block in requirements(Path(lock).read_text()):
        if bool(COMPILED.fullmatch(name)) != compiled:
            continue
        if any(pattern.fullmatch(name) for pattern in skip):
            left_out.append(name)
        else:
            print(block)
    print("left out:", ", ".join(dict.fromkeys(left_out)) or "nothing", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
