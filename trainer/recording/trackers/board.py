"""TensorBoard scalars that survive a full disk: points are kept until a flush has succeeded."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.recording.trackers.base import Tracker

if TYPE_CHECKING:  # only the first rank writes, and importing it takes half a second
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Board(Tracker):
    """Scalars under run_dir/tb, after `resumed_step`.

    A SummaryWriter is unusable after its first failed write. The next flush then opens a new one, which purges what the
    old one wrote since the last successful flush and writes those points again.
    """

    def __init__(self, run_dir: str | Path, resumed_step: int) -> None:
        self._directory = Path(run_dir) / "tb"
        self._flushed = resumed_step
        self._kept: list[tuple[int, dict[str, float]]] = []
        self._writer: SummaryWriter | None = None
        self._warned = False
        self.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        """The points of one step."""
        self._kept.append((step, values))
        try:
            if self._writer is not None:
                self._write(self._writer, step, values)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Write everything since the last successful flush; a disk error only warns, and the next flush retries."""
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._directory, purge_step=self._flushed + 1)
                for step, values in self._kept:
                    self._write(self._writer, step, values)
            self._writer.flush()
        except OSError as error:
            self._fail(error)
            return
        if self._kept:
            self._flushed = self._kept[-1][0]
        self._kept.clear()
        self._warned = False

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def _write(self, writer: SummaryWriter, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def _fail(self, error: OSError) -> None:
        if not self._warned:
            log.warning("%s cannot be written (%s); its points wait in memory", self._directory, error.strerror)
        self._warned = True
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None
