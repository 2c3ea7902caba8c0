"""Whether the caches of an engine fit into memory, known before anything is allocated."""

from __future__ import annotations

import torch

from trainer.arithmetic.states import cache_bytes
from trainer.errors import SpecError
from trainer.model.hybrid import HybridModel
from trainer.ops.experts import compute_dtype
from trainer.process.hostmemory import limit_bytes, resident_bytes

MIB = 2**20
SHARE = 0.8  # of what is free, for the states of texts


def needed(model: HybridModel, rows: int, length: int, *, drafts: bool = False) -> int:
    """Bytes of the caches of an Engine."""
    size = compute_dtype(model.no_tokens).itemsize
    return (rows + 1) * cache_bytes(model.spec, length + 1, size, drafts=drafts)


def free(device: torch.device) -> int:
    """Bytes that this process may still allocate."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator, unused
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, limit_bytes() - resident_bytes())


def fitting_rows(model: HybridModel, wanted: int, length: int, *, drafts: bool = False) -> int:
    """Texts at the same time, at most `wanted`: as many as fit into most of what is free.

    Raises:
        SpecError: not even one fits.
    """
    each = max(1, needed(model, 0, length, drafts=drafts))
    room = int(free(model.no_tokens.device) * SHARE) // each - 1
    rows = min(wanted, max(room, 1))
    check(model, rows, length, drafts=drafts)
    return rows


def check(model: HybridModel, rows: int, length: int, *, drafts: bool = False) -> int:
    """`needed`, if it is free.

    Raises:
        SpecError: it is not; says how many texts or which length would fit.
    """
    device = model.no_tokens.device
    wanted, available = needed(model, rows, length, drafts=drafts), free(device)
    if wanted <= available:
        return wanted
    fitting = available // max(1, needed(model, 0, length, drafts=drafts)) - 1
    advice = f"{fitting} fit" if fitting > 0 else "not even one fits; ask for shorter texts"
    texts = "1 text" if rows == 1 else f"{rows} texts"
    raise SpecError(
        f"{texts} of {length} tokens need {wanted // MIB:,} MiB for their states and {available // MIB:,} MiB are "
        f"free on {device}: {advice}"
    )
