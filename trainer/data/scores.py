"""A score of each document of a shard, for the order of training: `PREFIX.scores` beside `PREFIX.bin`.

    offset      bytes   content
    0           8       magic "YAOSCOR1"
    8           4·n     f32 score of each of n documents, in the order of the index

Little-endian. Only sources with such an order have the file; the manifest has its checksum. Imports no torch.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.sidecar import beside, damaged, explained
from trainer.files import atomic_write

MAGIC = b"YAOSCOR1"
SUFFIX = ".scores"
Scores = NDArray[np.float32]
LARGEST = float(np.finfo(np.float32).max)


def compression(text: bytes) -> float:
    """Bytes of zlib per byte of text; more than 1 for very short ones, 0 for none."""
    return len(zlib.compress(text, 6)) / len(text) if text else 0.0


def number(value: Any) -> float:
    """A score as it stands in a row: a number, or a text that is one, as in CSV.

    Raises:
        ValueError: it is something else, or not finite in 32 bits; says what it is.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= LARGEST:
        raise ValueError("nothing" if value is None else f"{str(value)[:40]!r}")
    return found


def write_scores(prefix: str | Path, scores: Scores) -> None:
    atomic_write(beside(prefix, SUFFIX), MAGIC + scores.astype("<f4").tobytes())


def read_scores(prefix: str | Path, documents: int) -> Scores:
    """Raises DataError if the file is missing, malformed, or not for a shard of `documents` documents."""
    path = beside(prefix, SUFFIX)
    with explained(path):
        data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC or len(data) != len(MAGIC) + 4 * documents:
        raise damaged(path, f"not the scores of {documents} documents")
    scores: Scores = np.frombuffer(data, "<f4", documents, len(MAGIC))
    if not np.isfinite(scores).all():
        raise damaged(path, "scores that are not numbers")
    return scores
