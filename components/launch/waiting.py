"""Watch what Kueue says of a launched job while it waits in its queue."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import Any

from components.cluster import kueue, state
from components.cluster.api import Cluster
from components.cluster.kueue import InQueue
from components.diagnose.causes import Obstacle
from components.diagnose.queued import queued
from manifests.kinds import QUEUE_LABEL, Object
from trainer.errors import LaunchError

LOOK_SECONDS = 3.0  # every look is three short requests
REPEAT_SECONDS = 60.0  # between two lines of which only the place in the queue differs


class QueueWatcher(threading.Thread):
    """Puts what holds the job back into `changes`, first and whenever it changes; for a job without a queue nothing.

    `job` is replaced by the follower, so that nothing is asked while the job is not suspended. A hopeless cause counts
    when it is seen twice in a row: what was wrong may just have been put right.
    """

    def __init__(self, cluster: Cluster, job: Object, changes: queue.Queue[Any]) -> None:
        super().__init__(name="watch-queue", daemon=True)
        self.job = job
        self.queue: str = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "")
        self._cluster, self._changes = cluster, changes
        self._stopped = threading.Event()
        self._told: tuple[Obstacle, str, float] | None = None  # cause, whole text, when

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while self.queue and not self._stopped.wait(LOOK_SECONDS):
            if not state.is_suspended(self.job):
                self._told = None
                continue
            try:
                found = kueue.look(self._cluster, self.job)
            except (LaunchError, ValueError, KeyError, TypeError):  # silent for a while; or from a proxy
                continue
            if found is not None:
                self._tell(found)

    def _tell(self, found: InQueue) -> None:
        namespace = self._cluster.namespace
        cause = queued(self.job, replace(found, position=None), namespace, ages=False)
        whole = queued(self.job, found, namespace, ages=False)
        now = time.monotonic()
        if self._told is not None:
            before, text, when = self._told
            if cause == before and not cause.hopeless and (whole.text == text or now - when < REPEAT_SECONDS):
                return
        again = self._told is not None and self._told[0] == cause
        self._told = cause, whole.text, now
        self._changes.put(replace(whole, hopeless=cause.hopeless and again))
