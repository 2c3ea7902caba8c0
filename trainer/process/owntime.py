"""Measure a rank's own work, so that a slow rank is visible.

Ranks wait for each other in every step, so step times are equal on all ranks. A slow rank shows in the time of work
that does not wait for others: loading data, and forward passes (under fsdp or expert parallelism these wait too, so
only slow data is visible).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnTime:
    """Measures blocks of work on one device; on a GPU by events on its stream, which no kernel waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds measured since the last call; the device must have finished that work."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
