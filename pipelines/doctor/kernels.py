"""Compare the kernels that are installed here with their references, as a run does where no record is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.doctor.findings import Finding


def findings() -> Iterator[Finding]:
    """A finding for each kernel and number format, and one for what kept others from being compared; none on a CPU."""
    try:
        import torch
    except (ImportError, OSError):  # told by another check
        return
    seen = set()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability not in seen:
            seen.add(capability)
            yield from of_device(torch.device("cuda", index))


def of_device(device: Any) -> Iterator[Finding]:
    from trainer.proof.comparisons import everything
    from trainer.proof.prove import Limits
    from trainer.proof.start import of_node

    proof = of_node(everything(device), device, None, Limits())
    for record in sorted(proof.records, key=lambda record: record.key):
        which = f"{record.op} by {record.backend}"
        detail = f"{record.variant}, {record.package} {record.version}: {record.outcome}"
        remedy = "" if record.passed else f"runs pass over it; try another version of {record.package}"
        yield Finding(which, "ok" if record.passed else "missing", detail, remedy)
    for problem in proof.problems:
        yield Finding("kernels", "unknown", problem)
