"""Runs comparisons in a process of its own, for a kernel may crash, hang, or leave the GPU unusable.

    python -m trainer.proof.child < request.json

The request names a device, the bytes of its memory that may be used, modules that must not be imported, and
comparisons. A line is printed before and after each comparison and each import of a package, so that the parent knows
what the process died in. Whatever else is printed here, by a package or a compiler, goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, TextIO

import torch

from trainer.ops import packages
from trainer.parity import plain
from trainer.proof.comparisons import Comparison

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    if sys.platform == "linux":  # a kernel that hangs would keep the GPU after the run has been killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    packages.refuse(request["refused"])
    packages.observe(lambda module: tell(answers, importing=module))
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request["memory_bytes"] / total), device)
    for number, (*fields, recorded) in enumerate(request["comparisons"]):
        tell(answers, begun=number)
        found = answer(Comparison(*fields), device, recorded)
        problem = unusable(device)
        tell(answers, done=number, unusable=problem, **found)
        if problem:
            return


def answer(comparison: Comparison, device: torch.device, recorded: bool) -> dict[str, Any]:
    """A record, or why there is none: it cannot run here, or the comparison says nothing about the kernel.

    Args:
        recorded: there is a record of it already; only whether it can be imported is asked.
    """
    try:
        if (problem := comparison.unsupported(device)) is not None:
            return {"unsupported": problem}
        if recorded:
            return {}
        record = comparison.run(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # of torch, Triton, a package, …
        if is_of_machine(error):
            return {"unfinished": first_line(error)}
        record = comparison.failed(f"fails: {type(error).__name__}: {first_line(error)}", device)
    return {"record": plain(record)}


def is_of_machine(error: Exception) -> bool:
    """Whether it is about memory or files (a compiler or a place for its output is missing) and not about a kernel."""
    lacking = "out of memory" in str(error).lower() or "ALLOC_FAILED" in str(error)
    return lacking or isinstance(error, (torch.OutOfMemoryError, MemoryError, OSError))


def unusable(device: torch.device) -> str | None:
    """Why nothing more can be computed here, as after an illegal memory access; None if all is well."""
    try:
        if device.type == "cuda":
            torch.zeros(1, device=device).item()
    except RuntimeError as error:
        return None if is_of_machine(error) else first_line(error)
    return None


def tell(answers: TextIO, **line: object) -> None:
    print(json.dumps(line), file=answers, flush=True)


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


if __name__ == "__main__":
    main()
