"""Operations with more than one implementation, and the one place that chooses among them.

Every operation has a `reference` backend, plain torch that reads like its definition, and faster ones that are tested
against it (forward, backward, ragged documents, empty experts). `resolve` chooses once, at build time, and gives a
reason; a backend that was named explicitly and cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trainer.ops.attention import attention_reference, attention_sdpa
from trainer.ops.conv import conv_reference, conv_torch
from trainer.ops.documents import Documents
from trainer.ops.experts import experts_grouped, experts_reference, grouped_unsupported
from trainer.ops.ssd import ssd_chunked, ssd_reference
from trainer.spec import BackendsSpec

__all__ = ["OPS", "Backend", "Choice", "Documents", "Op", "functions", "resolve"]


def _runs_anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation. `unsupported(device)` is None when it can run there, else the reason why not."""

    function: Callable[..., Any]
    why: str
    unsupported: Callable[[torch.device], str | None] = _runs_anywhere


@dataclass(frozen=True)
class Op:
    """Implementations of one operation by name, the fastest first."""

    name: str
    backends: dict[str, Backend]


class Choice(NamedTuple):
    name: str
    reason: str


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "ssd",
            {
                "chunked": Backend(ssd_chunked, "matrix products within chunks, one state per chunk"),
                "reference": Backend(ssd_reference, "recurrence over positions"),
            },
        ),
        Op(
            "conv",
            {
                "torch": Backend(conv_torch, "shifted multiply-adds with a hand-written backward"),
                "reference": Backend(conv_reference, "loop over positions"),
            },
        ),
        Op(
            "attention",
            {
                "sdpa": Backend(attention_sdpa, "torch scaled_dot_product_attention with a document mask"),
                "reference": Backend(attention_reference, "explicit softmax"),
            },
        ),
        Op(
            "experts",
            {
                "grouped": Backend(
                    experts_grouped, "tokens sorted by expert, grouped matrix products", grouped_unsupported
                ),
                "reference": Backend(experts_reference, "loop over experts"),
            },
        ),
    )
}


def resolve(backends: BackendsSpec, device: torch.device | str) -> dict[str, Choice]:
    """The backend of each operation on `device`, with the reason.

    Raises:
        ValueError: a backend named explicitly cannot run on this device.
    """
    device = torch.device(device)
    choices = {}
    for op in OPS.values():
        wanted = getattr(backends, op.name)
        if wanted == "auto":
            choices[op.name] = _fastest(op, device)
            continue
        problem = op.backends[wanted].unsupported(device)
        if problem is not None:
            raise ValueError(f"backends.{op.name}: '{wanted}' cannot run on {device.type} ({problem}); use 'auto'")
        choices[op.name] = Choice(wanted, "named in the spec")
    return choices


def _fastest(op: Op, device: torch.device) -> Choice:
    passed_over = []
    for name, backend in op.backends.items():
        problem = backend.unsupported(device)
        if problem is None:
            return Choice(name, "; ".join([backend.why, *passed_over]))
        passed_over.append(f"not {name}: {problem}")
    raise AssertionError(f"operation {op.name} has no backend that runs on {device.type}")


def functions(choices: dict[str, Choice]) -> dict[str, Callable[..., Any]]:
    """The chosen implementations, by operation."""
    return {name: OPS[name].backends[choice.name].function for name, choice in choices.items()}
