"""Follow one job from its current state to its end and report what happens and how it ended.

Watch threads put changes into one queue; all state is updated in the calling thread.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from components.cluster import state
from components.cluster.api import Cluster
from components.cluster.watch import Change, LogFollower, Watcher
from components.diagnose import explain
from components.launch.phases import PhaseMetrics
from components.launch.waiting import QueueWatcher
from manifests.clusterspec import ClusterSpec
from manifests.kinds import Object, kind_of, workers
from manifests.names import TASK_LABEL
from trainer.errors import LaunchError

# A registry that is down may come back, but GPUs must not stay reserved for long by pods that cannot pull.
PULL_PATIENCE_SECONDS = 60
LOG_TAIL_LINES = 20
# Time for the rest of the log after success; otherwise worker 0 may write until it is stopped.
LOG_DRAIN_SECONDS, LOG_DRAIN_AFTER_FAILURE_SECONDS = 15, 3


class JobFailed(LaunchError):
    """The workers ran and failed; the job is kept for inspection, since none of its pods runs."""


@dataclass
class _Clock:
    """Time spent in the current phase."""

    phase: state.Phase
    since: float


class Follower:
    """For one use: create it and call `follow`.

    Args:
        job: the job object from the API server, with its UID.
        limits: only the time limits are read.
    """

    def __init__(self, cluster: Cluster, job: Object, limits: ClusterSpec, write: Callable[[str], None]) -> None:
        self.cluster, self.limits, self.write = cluster, limits, write
        self.job, self.kind = job, kind_of(job)
        self.name: str = job["metadata"]["name"]
        self.uid: str = job["metadata"]["uid"]
        self.workers = workers(job)
        self.pods: dict[str, Object] = {}  # by worker
        self.uids: dict[str, str] = {}  # of each worker's latest pod
        self.ended: dict[str, explain.Exit] = {}  # by UID; a restarted worker's old pod is soon gone
        self.suspended: set[str] = set()  # UIDs of pods that were there when the job was suspended
        self.obstacles: dict[str, explain.Obstacle] = {}  # by worker, or "" for the job
        self.pulling_since: dict[str, float] = {}
        self.told: set[str] = set()
        self.told_of_queue: set[str] = set()  # to be told again if the job loses its place
        self.shown: set[str] = set()  # pods whose log is printed as it is written
        self.restarts = 0
        self.metrics = PhaseMetrics(job["metadata"]["labels"][TASK_LABEL])
        # For a job found running, the time it has run counts, and a worker being replaced has not waited that long; for
        # any other job, the time it has waited counts.
        begun = time.monotonic() - state.age_seconds(job)
        is_running = state.is_running(job)
        self.clock = _Clock("queued", time.monotonic() if is_running else begun)
        self.running_since = time.monotonic() - state.running_seconds(job) if is_running else None
        self.suspended_since = time.monotonic() if state.is_suspended(job) else None
        self.pods_known = False
        self.changes: queue.Queue[Change | explain.Obstacle | LaunchError] = queue.Queue()
        self.in_queue = QueueWatcher(cluster, job, self.changes)
        self.log = LogFollower(cluster, write)
        core, custom, space = cluster.core, cluster.custom, cluster.namespace
        one_job = functools.partial(
            custom.list_namespaced_custom_object,
            self.kind.group,
            self.kind.version,
            space,
            self.kind.plural,
            field_selector=f"metadata.name={self.name}",
        )
        its_pods = functools.partial(core.list_namespaced_pod, space, label_selector=self.kind.selector(self.name))
        warnings = functools.partial(core.list_namespaced_event, space, field_selector="type=Warning")
        self.watchers = [
            Watcher(cluster, kind, call, self.changes)
            for kind, call in ((self.kind.plural, one_job), ("pods", its_pods), ("events", warnings))
        ]

    def follow(self) -> None:
        """Return on success.

        Raises:
            JobFailed, LaunchError
        """
        for thread in (self.log, self.in_queue, *self.watchers):
            thread.start()
        drain_seconds = LOG_DRAIN_AFTER_FAILURE_SECONDS
        try:
            while not self._step():
                self.metrics.tick(self.clock.phase)
            drain_seconds = LOG_DRAIN_SECONDS
        finally:
            self.in_queue.stop()
            for watcher in self.watchers:
                watcher.stop()
            self.log.finish(drain_seconds)

    def _step(self) -> bool:
        """Process one change; True if the job has succeeded."""
        try:
            change = self.changes.get(timeout=1)
        except queue.Empty:
            return self._check_clocks()
        if isinstance(change, LaunchError):
            raise change
        if isinstance(change, explain.Obstacle):
            if self.suspended_since is not None:
                self.told_of_queue.add(str(change))
                self._note("", change)
        elif change.kind == "pods":
            self._see_pods(change)
        elif change.kind == "events":
            for event in change.objects:
                self._see_event(event)
        elif self._see_job(change):
            return True
        return self._check_clocks()

    def _see_job(self, change: Change) -> bool:
        mine = [found for found in change.objects if found["metadata"]["uid"] == self.uid]
        gone = not mine if change.type == "LISTED" else bool(mine) and change.type == "DELETED"
        if gone:
            raise LaunchError(f"job {self.name} was deleted in namespace '{self.cluster.namespace}' by someone else")
        for job in mine:
            self.job = self.in_queue.job = job
            self._see_suspension(state.is_suspended(job))
            if state.has_succeeded(job):
                with suppress(LaunchError):  # whatever a pod reports as missing, the job has succeeded
                    self._see_latest_pods()
                self.write(f"launcher: job {self.name} succeeded ({self.restarts} restarts)")
                return True
            if state.has_condition(job, "Failed"):
                self._fail(job)
        return False

    def _see_suspension(self, is_suspended: bool) -> None:
        """The time that a job is suspended, most often in a queue, is no part of its run."""
        if is_suspended and self.suspended_since is None:
            self.suspended_since = time.monotonic()
            self.suspended |= set(self.uids.values())
            self.write(f"launcher: job {self.name} was suspended; it goes on from its last checkpoint")
        elif not is_suspended and self.suspended_since is not None:
            if self.running_since is not None:
                self.running_since += time.monotonic() - self.suspended_since
            self.suspended_since = None
            self.obstacles.pop("", None)
            self.told -= self.told_of_queue
            by = f"admitted by queue '{self.in_queue.queue}'" if self.in_queue.queue else "resumed"
            self.write(f"launcher: job {self.name} is {by}")

    def _see_pods(self, change: Change) -> None:
        if change.type == "LISTED":
            self.pods, self.pods_known = {}, True
        for pod in change.objects:
            self._see_pod(pod, gone=change.type == "DELETED")
        phase = state.phase_of(self.pods.values(), self.workers)
        if phase != self.clock.phase:
            self.clock = _Clock(phase, time.monotonic())
            self.write(f"launcher: job {self.name} is {phase}")
            if phase != "queued":
                self.obstacles.pop("", None)  # all workers could be created
            if phase == "running" and self.running_since is None:
                self.running_since = time.monotonic()

    def _see_latest_pods(self) -> None:
        """Read the pods again: the job's end may be reported before its pods' end, or even before a short pod's
        start."""
        for pod in self.cluster.pods(self.kind, self.name):
            self._see_pod(pod, gone=False)

    def _see_pod(self, pod: Object, *, gone: bool) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        worker = self.kind.worker_of(pod)
        if self.uids.setdefault(worker, uid) != uid and not gone:
            self._see_replaced(worker, pod)
        end = explain.exit_of(pod)
        if end is not None and uid not in self.ended:
            self.ended[uid] = end
            if end.code != 0:
                self.write(f"launcher: {end.describe()}")
        if worker == self.kind.worker_name(self.name, 0) and state.has_started(pod):
            self.shown.add(name)
            self.log.add(pod)
        if end is not None or gone:
            self.log.ended(uid)
        if gone:
            if self.uids[worker] == uid:
                self.pods.pop(worker, None)
                self.obstacles.pop(worker, None)
                self.pulling_since.pop(worker, None)
            return
        self.pods[worker] = pod
        found = explain.obstacle(pod)
        if found is None:
            self.obstacles.pop(worker, None)
        else:
            self._note(worker, found)
        if found is not None and found.pulling:
            self.pulling_since.setdefault(worker, time.monotonic())
        else:
            self.pulling_since.pop(worker, None)

    def _see_replaced(self, worker: str, pod: Object) -> None:
        """The worker has a new pod."""
        before, self.uids[worker] = self.uids[worker], pod["metadata"]["uid"]
        self.metrics.restarted()
        if self.kind.attempt_label:
            self.restarts = max(self.restarts, int(pod["metadata"]["labels"][self.kind.attempt_label]))
            return
        if before not in self.ended and before not in self.suspended:
            self.write(f"launcher: {worker} was removed from outside")
        self.restarts += 1

    def _see_event(self, event: Object) -> None:
        if not state.is_about(event, self.job):
            return
        if found := explain.creation_obstacle(event):
            self._note("", found)
        elif state.is_news(event):
            text = f"{event.get('reason')}: {state.one_line(event.get('message', ''))}"
            self._tell(event["involvedObject"]["name"], text)

    def _note(self, worker: str, found: explain.Obstacle) -> None:
        self.obstacles[worker] = found
        if found.hopeless:
            raise LaunchError(f"job {self.name} cannot start: {self._named(worker, str(found))}")
        self._tell(worker, str(found))

    def _tell(self, what: str, text: str) -> None:
        """Print a message once, for the first pod or worker it applies to."""
        if text not in self.told:
            self.told.add(text)
            self.write(f"launcher: {self._named(what, text)}")

    @staticmethod
    def _named(what: str, text: str) -> str:
        return f"{what}: {text}" if what else text

    def _fail(self, job: Object) -> None:
        self._see_latest_pods()
        cause = explain.culprit(self.ended.values())
        if cause is None or not cause.final:
            # So not because of a worker's exit: the operator's deadline, or an eviction under another restart policy.
            before = f"; before that {cause.describe()}" if cause else ""
            fix = f"; {explain.AFTER_DEADLINE}" if state.is_past_deadline(job) else ""
            raise JobFailed(f"job {self.name} failed: {state.condition_message(job, 'Failed')}{before}{fix}")
        tail = self.cluster.log_tail(cause.pod, LOG_TAIL_LINES)
        if cause.pod not in self.shown:
            for line in tail:
                self.write(f"{cause.pod}: {line}")
        last = state.one_line("\n".join(tail[-3:]))
        told = not last or (cause.message and cause.message in last)
        said = "" if told else f"; last lines: {last}"
        raise JobFailed(f"job {self.name} failed: {cause.describe()}{said}", cause.code)

    def _check_clocks(self) -> bool:
        """Raise if a time limit has passed; True if a last read shows that the job has succeeded.

        The limits hold whatever fails. If a watcher fails, the known state may be out of date, so it is read again.
        """
        silence = f"the API server {self.cluster.server} does not answer; trying again, the job keeps running"
        silent = any(watcher.unreachable_since is not None for watcher in self.watchers)
        if silent:
            self._tell("", silence)
        else:
            self.told.discard(silence)
        if silent or not self.pods_known:
            if self._passed() and self._look_again():
                return True
        elif any(time.monotonic() - since > PULL_PATIENCE_SECONDS for since in self.pulling_since.values()):
            raise LaunchError(f"job {self.name} cannot start: {self._why()}")
        if passed := self._passed():
            raise LaunchError(passed)
        return False

    def _look_again(self) -> bool:
        """Read job and pods, as far as the API answers; True if the job has succeeded."""
        try:
            job = self.cluster.get(self.kind.kind, self.name)
            pods = self.cluster.pods(self.kind, self.name)
        except (LaunchError, ValueError, KeyError, TypeError):  # perhaps from a proxy
            return False
        if self._see_job(Change(self.kind.plural, "LISTED", [job] if job else [])):
            return True
        self._see_pods(Change("pods", "LISTED", pods))
        return False

    def _passed(self) -> str:
        """The time limit that has passed, "" for none."""
        now, limits = time.monotonic(), self.limits
        spent = now - self.clock.since
        if self.clock.phase == "queued" and spent > limits.queue_timeout_seconds:
            return f"job {self.name} waited {spent:.0f} s for nodes (cluster.queue_timeout_seconds): {self._why()}"
        if self.clock.phase == "starting" and spent > limits.start_timeout_seconds:
            return (
                f"job {self.name} has not started within {spent:.0f} s (cluster.start_timeout_seconds): {self._why()}"
            )
        since = self.running_since if self.suspended_since is None else None
        if since is not None and now - since > limits.run_timeout_seconds:
            return (
                f"job {self.name} ran longer than cluster.run_timeout_seconds = {limits.run_timeout_seconds}; "
                "start it again to continue from its last checkpoint"
            )
        return ""

    def _why(self) -> str:
        obstacles = [self._named(worker, str(found)) for worker, found in self.obstacles.items()]
        return "; ".join(obstacles) or self._no_reason()

    def _no_reason(self) -> str:
        if state.has_condition(self.job, "Suspended"):
            return "the job is suspended, as jobs are that wait in a queue"
        if not self.job.get("status", {}).get("conditions"):
            return f"{self.kind.operator} has not taken it up; check that it runs"
        return "no reason given by the cluster"
