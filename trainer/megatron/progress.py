"""Progress of a conversion: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence

from trainer.checkpoints.boxes import Box

log = logging.getLogger(__name__)

LINE_SECONDS, BAR = 10.0, 30


class Progress:
    """Counts elements of `boxes`."""

    def __init__(self, label: str, boxes: Sequence[Box]) -> None:
        self._label, self._total = label, sum(math.prod(box.shape) for box in boxes)
        self._done, self._started = 0, time.monotonic()
        self._said = self._started

    def advance(self, box: Box) -> None:
        self._done += math.prod(box.shape)
        now, share = time.monotonic(), self._done / self._total
        left = (now - self._started) / share * (1 - share)
        if sys.stderr.isatty():
            full = round(share * BAR)
            bar = f"\r{self._label} [{'#' * full}{'.' * (BAR - full)}] {share:4.0%}, {left:.0f} s left "
            print(bar, end="" if share < 1 else "\n", file=sys.stderr, flush=True)
        elif now - self._said > LINE_SECONDS:
            self._said = now
            log.info("%s: %.0f%%, %.0f s left", self._label, 100 * share, left)

    def done(self) -> None:
        log.info("%s: %.3g weights in %.0f s", self._label, self._total, time.monotonic() - self._started)
