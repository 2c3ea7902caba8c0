"""An evenly spread sample of a source's raw text, to train the tokenizer and compare encoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.jsonl import documents
from trainer.data.manifest import Manifest

WINDOW_BYTES = 2**20


def sample(directory: str | Path, manifest: Manifest, source: str, budget_bytes: int) -> Iterator[str]:
    """Texts of one source from evenly spaced windows, until they have `budget_bytes` or the source ends."""
    windows = [
        (entry.path, start) for entry in manifest.select(source) for start in range(0, entry.bytes, WINDOW_BYTES)
    ]
    taken = 0
    for path, start in _spread(windows):
        for _, text in documents(Path(directory) / path, start, start + WINDOW_BYTES):
            if taken >= budget_bytes:
                return
            taken += len(text.encode())
            yield text


def _spread(windows: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """All windows in bit-reversed order: any prefix is spread evenly over the whole."""
    bits = max(len(windows) - 1, 1).bit_length()
    for number in range(2**bits):
        position = int(f"{number:0{bits}b}"[::-1], 2)
        if position < len(windows):
            yield windows[position]
