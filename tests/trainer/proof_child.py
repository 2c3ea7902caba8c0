"""The child process of a proof with kernels that do what broken packages do, each a backend of the attention.

python tests/trainer/proof_child.py < request.json
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from trainer.ops import OPS, Backend, packages
from trainer.ops.attention import attention_sdpa
from trainer.proof import child

MUCH = b"warning: ptxas is deprecated\n" * 200_000  # far more than pipes hold
poisoned: list[str] = []


def crashes(*arguments: object) -> torch.Tensor:
    subprocess.Popen(["sleep", "60"])  # a compiler that it leaves behind, with its pipes
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
    os.abort()


def uses_all_memory(*arguments: object) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)  # as Linux does then
    raise AssertionError


def exits(*arguments: object) -> torch.Tensor:
    raise SystemExit(3)


def raises(*arguments: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nsecond line")


def fills(*arguments: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def errs(*arguments: torch.Tensor) -> torch.Tensor:
    print('{"done": 0, "record": "printed by a package"}')
    return attention_sdpa(*arguments) * 1.01


def errs_on_node_1(*arguments: torch.Tensor) -> torch.Tensor:
    return attention_sdpa(*arguments) * (1.01 if os.environ.get("NODE_NAME") == "node-1" else 1.0)


def is_right(*arguments: torch.Tensor) -> torch.Tensor:
    return attention_sdpa(*arguments)


def shouts(*arguments: torch.Tensor) -> torch.Tensor:
    for stream in (1, 2):
        os.write(stream, MUCH)
    return attention_sdpa(*arguments)


def poisons(*arguments: object) -> torch.Tensor:
    poisoned.append("CUDA error: an illegal memory access was encountered")
    raise RuntimeError(poisoned[0])


def holds(*arguments: object) -> torch.Tensor:
    Path(os.environ["HELD"]).write_text(str(os.getpid()))
    time.sleep(600)
    raise AssertionError


def cannot_write(*arguments: object) -> torch.Tensor:
    raise PermissionError(13, "Permission denied", "/home/nobody/.triton")


def needs(module: str) -> Backend:
    """A backend of a package that an import of this module loads."""
    return Backend(attention_sdpa, "broken", lambda setting: packages.problem(packages.load(module)), portable=False)


ALL = (
    crashes,
    uses_all_memory,
    exits,
    raises,
    fills,
    errs,
    errs_on_node_1,
    is_right,
    shouts,
    poisons,
    cannot_write,
    holds,
)
BROKEN = {each.__name__: Backend(each, "broken", portable=False) for each in ALL}
BROKEN |= {module: needs(module) for module in ("yaongi_segfaults", "yaongi_exits", "yaongi_refuses")}

if __name__ == "__main__":
    OPS["attention"].backends.update(BROKEN)
    child.unusable = lambda device: next(iter(poisoned), None)  # as a GPU is after an illegal memory access
    child.main()
