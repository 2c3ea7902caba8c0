"""The child process of a proof with kernels that do what broken packages do, each a backend of the attention.

python tests/trainer/proof_child.py < request.json
"""

from __future__ import annotations

import os
import sys

import torch

from trainer.ops import OPS, Backend
from trainer.ops.attention import attention_sdpa
from trainer.proof import child


def crashes(*arguments: object) -> torch.Tensor:
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
    os.abort()


def exits(*arguments: object) -> torch.Tensor:
    raise SystemExit(3)


def raises(*arguments: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nsecond line")


def fills(*arguments: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def errs(*arguments: torch.Tensor) -> torch.Tensor:
    print('{"done": 0, "record": "printed by a package"}')
    return attention_sdpa(*arguments) * 1.01


ALL = crashes, exits, raises, fills, errs
BROKEN = {each.__name__: Backend(each, "broken", portable=False) for each in ALL}

if __name__ == "__main__":
    OPS["attention"].backends.update(BROKEN)
    child.main()
