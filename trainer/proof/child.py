"""Runs comparisons in a process of its own, for a kernel may crash, hang, or leave the GPU unusable.

    python -m trainer.proof.child < request.json

The request names a device, the bytes of its memory that may be used, and comparisons. A line is printed before each
comparison and one after it, so that the parent knows which one the process died in. Whatever else is printed here, by
a package or a compiler, goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

import torch

from trainer.parity import plain
from trainer.proof.comparisons import Comparison


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request["memory_bytes"] / total), device)
    for number, fields in enumerate(request["comparisons"]):
        comparison = Comparison(*fields)
        tell(answers, begun=number)
        try:
            record = comparison.run(device)
        except torch.OutOfMemoryError as error:  # says nothing about the kernel
            tell(answers, done=number, unfinished=first_line(error))
            continue
        except Exception as error:  # of torch, Triton, a package, …
            record = comparison.failed(f"fails: {type(error).__name__}: {first_line(error)}", device)
        tell(answers, done=number, record=plain(record))


def tell(answers: TextIO, **line: object) -> None:
    print(json.dumps(line), file=answers, flush=True)


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


if __name__ == "__main__":
    main()
