"""Progress of a step in bytes: a bar with rate and time left on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from components import measuring

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 5.0


class ByteProgress:
    """`with ByteProgress("shards", total_bytes) as progress: progress.advance(n)`; `total_bytes` None when unknown.

    The bytes also count in the step's metrics, and as input of `source` if given.
    """

    def __init__(self, label: str, total_bytes: int | None, done_bytes: int = 0, source: str | None = None) -> None:
        self._label, self._source = label, source
        self._total = total_bytes
        self._done = self._done_before = done_bytes
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as TimeLeft
            from rich.progress import TransferSpeedColumn as Speed

            columns = (TextColumn(label), BarColumn(), DownloadColumn(), Speed(), TimeLeft())
            self._bar = Progress(*columns, console=Console(file=sys.stdout))
            self._task = self._bar.add_task(label, total=total_bytes, completed=done_bytes)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            print(self._line(), flush=True)

    def advance(self, num_bytes: int) -> None:
        measuring.worked_through(num_bytes, self._source)
        self._done += num_bytes
        if self._bar:
            self._bar.advance(self._task, num_bytes)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self._line(), flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        rate = (self._done - self._done_before) / seconds
        from rich.filesize import decimal

        line = f"{self._label}: {decimal(self._done)}"
        if self._total:
            line += f" of {decimal(self._total)} ({self._done / self._total:.0%})"
        line += f", {decimal(int(rate))}/s"
        if self._total and rate and self._done < self._total:
            line += f", {(self._total - self._done) / rate:.0f} s left"
        return line
