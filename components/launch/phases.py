"""The phases of a launched job as metrics: the current one, and the time spent in each."""

from __future__ import annotations

import time
from typing import get_args

from components import measuring
from components.cluster.state import Phase
from manifests.names import Task


class PhaseMetrics:
    """One per followed job; `tick` is called about every second."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._phase: Phase | None = None
        self._last = time.monotonic()
        measuring.add("job_pod_restarts_total", 0, task=task)  # else the first one would not show as an increase

    def tick(self, phase: Phase) -> None:
        """The job is in `phase` now."""
        measuring.beat()
        now = time.monotonic()
        if self._phase:
            measuring.add("job_phase_seconds_total", now - self._last, task=self._task, phase=self._phase)
        self._phase, self._last = phase, now
        for each in get_args(Phase):
            measuring.set_gauge("job_phase", each == phase, task=self._task, phase=each)

    def restarted(self) -> None:
        """A pod has replaced another."""
        measuring.add("job_pod_restarts_total", task=self._task)
