"""Follow one PyTorchJob from wherever it is to its end, telling what happens and how it ended.

Threads watch and put what they see into one queue; all state changes happen in the calling thread.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from components.launch import LaunchError
from components.launch import kubernetes_explain as explain
from components.launch.kubernetes_api import GROUP, PLURAL, VERSION, Cluster, Object
from components.launch.kubernetes_watch import Change, LogFollower, Watcher
from components.launch.phases import PhaseMetrics
from manifests.names import OPERATOR_JOB_LABEL, TASK_LABEL, pod_name
from manifests.spec import ClusterSpec

# A registry that is down may come back; GPUs reserved for pods that pull in vain are not worth a longer wait.
PULL_PATIENCE_SECONDS = 60
LOG_TAIL_LINES = 20
# What is left of the log after success; after anything else worker 0 may go on writing until it is stopped.
LOG_DRAIN_SECONDS, LOG_DRAIN_AFTER_FAILURE_SECONDS = 15, 3


class JobFailed(LaunchError):
    """The workers ran and failed; the job stays for inspection, since none of its pods runs any more."""


@dataclass
class _Clock:
    """Time spent in the present phase."""

    phase: explain.Phase
    since: float


class Follower:
    """One use: make it, call `follow`.

    Args:
        job: the PyTorchJob as the API server has it, with its UID.
        limits: the time limits are read, nothing else.
    """

    def __init__(self, cluster: Cluster, job: Object, limits: ClusterSpec, write: Callable[[str], None]) -> None:
        self.cluster, self.limits, self.write = cluster, limits, write
        self.job = job
        self.name: str = job["metadata"]["name"]
        self.uid: str = job["metadata"]["uid"]
        self.workers: int = job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
        self.pods: dict[str, Object] = {}  # by name
        self.uids: dict[str, str] = {}  # of each worker's latest pod, by name
        self.ended: dict[str, explain.Exit] = {}  # by UID; a restarted worker's pod is soon gone
        self.obstacles: dict[str, explain.Obstacle] = {}  # by pod, or "" for the job
        self.pulling_since: dict[str, float] = {}
        self.told: set[str] = set()
        self.restarts = 0
        self.metrics = PhaseMetrics(job["metadata"]["labels"][TASK_LABEL])
        # Of a job found running, the time it has run already counts, and a worker that is just then replaced has not
        # waited that long; of any other job, the time it has waited counts.
        begun = time.monotonic() - explain.age_seconds(job)
        is_running = explain.has_condition(job, "Running")
        self.clock = _Clock("queued", time.monotonic() if is_running else begun)
        self.running_since = begun if is_running else None
        self.pods_known = False
        self.changes: queue.Queue[Change | LaunchError] = queue.Queue()
        self.log = LogFollower(cluster, write)
        core, custom, space = cluster.core, cluster.custom, cluster.namespace
        one_job = functools.partial(
            custom.list_namespaced_custom_object,
            GROUP,
            VERSION,
            space,
            PLURAL,
            field_selector=f"metadata.name={self.name}",
        )
        its_pods = functools.partial(
            core.list_namespaced_pod, space, label_selector=f"{OPERATOR_JOB_LABEL}={self.name}"
        )
        warnings = functools.partial(core.list_namespaced_event, space, field_selector="type=Warning")
        self.watchers = [
            Watcher(cluster, kind, call, self.changes)
            for kind, call in (("pytorchjobs", one_job), ("pods", its_pods), ("events", warnings))
        ]

    def follow(self) -> None:
        """Return on success.

        Raises:
            JobFailed, LaunchError
        """
        for thread in (self.log, *self.watchers):
            thread.start()
        drain_seconds = LOG_DRAIN_AFTER_FAILURE_SECONDS
        try:
            while not self._step():
                self.metrics.tick(self.clock.phase)
            drain_seconds = LOG_DRAIN_SECONDS
        finally:
            for watcher in self.watchers:
                watcher.stop()
            self.log.finish(drain_seconds)

    def _step(self) -> bool:
        """Take in one change; True when the job has succeeded."""
        try:
            change = self.changes.get(timeout=1)
        except queue.Empty:
            self._check_clocks()
            return False
        if isinstance(change, LaunchError):
            raise change
        if change.kind == "pods":
            self._see_pods(change)
        elif change.kind == "events":
            for event in change.objects:
                self._see_event(event)
        else:
            return self._see_job(change)
        self._check_clocks()
        return False

    def _see_job(self, change: Change) -> bool:
        mine = [found for found in change.objects if found["metadata"]["uid"] == self.uid]
        gone = not mine if change.type == "LISTED" else bool(mine) and change.type == "DELETED"
        if gone:
            raise LaunchError(f"job {self.name} was deleted in namespace '{self.cluster.namespace}' by somebody else")
        for job in mine:
            self.job = job
            if explain.has_condition(job, "Succeeded"):
                self.write(f"launcher: job {self.name} succeeded ({self.restarts} restarts)")
                return True
            if explain.has_condition(job, "Failed"):
                self._fail(job)
        return False

    def _see_pods(self, change: Change) -> None:
        if change.type == "LISTED":
            self.pods, self.pods_known = {}, True
        for pod in change.objects:
            self._see_pod(pod, gone=change.type == "DELETED")
        phase = explain.phase_of(self.pods.values(), self.workers)
        if phase != self.clock.phase:
            self.clock = _Clock(phase, time.monotonic())
            self.write(f"launcher: job {self.name} is {phase}")
            if phase != "queued":
                self.obstacles.pop("", None)  # all workers could be created
            if phase == "running" and self.running_since is None:
                self.running_since = time.monotonic()

    def _see_pod(self, pod: Object, *, gone: bool) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if self.uids.setdefault(name, uid) != uid and not gone:
            if self.uids[name] not in self.ended:
                self.write(f"launcher: {name} was removed from outside")
            self.uids[name] = uid
            self.restarts += 1
            self.metrics.restarted()
        end = explain.exit_of(pod)
        if end is not None and uid not in self.ended:
            self.ended[uid] = end
            if end.code != 0:
                self.write(f"launcher: {end.describe()}")
        if name == pod_name(self.name, 0) and explain.has_started(pod):
            self.log.add(pod)
        if end is not None or gone:
            self.log.ended(uid)
        if gone:
            self.pods.pop(name, None)
            self.obstacles.pop(name, None)
            self.pulling_since.pop(name, None)
            return
        self.pods[name] = pod
        found = explain.obstacle(pod)
        if found is None:
            self.obstacles.pop(name, None)
        else:
            self._note(name, found)
        if found is not None and found.pulling:
            self.pulling_since.setdefault(name, time.monotonic())
        else:
            self.pulling_since.pop(name, None)

    def _see_event(self, event: Object) -> None:
        if not explain.is_about(event, self.job):
            return
        if found := explain.creation_obstacle(event):
            self._note("", found)
        elif explain.is_news(event):
            text = f"{event.get('reason')}: {explain.one_line(event.get('message', ''))}"
            self._tell(event["involvedObject"]["name"], text)

    def _note(self, pod: str, found: explain.Obstacle) -> None:
        self.obstacles[pod] = found
        if found.hopeless:
            raise LaunchError(f"job {self.name} cannot start: {self._named(pod, found.text)}")
        self._tell(pod, found.text)

    def _tell(self, pod: str, text: str) -> None:
        """Say it once, for the first pod that it is true of."""
        if text not in self.told:
            self.told.add(text)
            self.write(f"launcher: {self._named(pod, text)}")

    @staticmethod
    def _named(pod: str, text: str) -> str:
        return f"{pod}: {text}" if pod else text

    def _fail(self, job: Object) -> None:
        for pod in self.cluster.pods(self.name):
            self._see_pod(pod, gone=False)
        cause = explain.culprit(self.ended.values())
        if cause is None or not cause.final:
            # Not for a worker's exit then: the operator's own deadline, or an eviction under another restart policy.
            before = f"; before that {cause.describe()}" if cause else ""
            raise JobFailed(f"job {self.name} failed: {explain.condition_message(job, 'Failed')}{before}")
        tail = self.cluster.log_tail(cause.pod, LOG_TAIL_LINES)
        if cause.pod != pod_name(self.name, 0):
            for line in tail:
                self.write(f"{cause.pod}: {line}")
        last = explain.one_line("\n".join(tail[-3:]))
        told = not last or (cause.message and cause.message in last)
        said = "" if told else f"; last lines: {last}"
        raise JobFailed(f"job {self.name} failed: {cause.describe()}{said}")

    def _check_clocks(self) -> None:
        silence = f"the API server {self.cluster.server} does not answer; trying again, the job runs on"
        if any(watcher.unreachable_since is not None for watcher in self.watchers):
            # What is known may be out of date, so nothing is given up for it.
            self._tell("", silence)
            return
        self.told.discard(silence)
        if not self.pods_known:
            return
        now = time.monotonic()
        why = "; ".join(self._named(pod, found.text) for pod, found in self.obstacles.items()) or self._no_reason()
        spent = now - self.clock.since
        if any(now - since > PULL_PATIENCE_SECONDS for since in self.pulling_since.values()):
            raise LaunchError(f"job {self.name} cannot start: {why}")
        if self.clock.phase == "queued" and spent > self.limits.queue_timeout_seconds:
            raise LaunchError(f"job {self.name} waited {spent:.0f} s for nodes (cluster.queue_timeout_seconds): {why}")
        if self.clock.phase == "starting" and spent > self.limits.start_timeout_seconds:
            raise LaunchError(
                f"job {self.name} has not started within {spent:.0f} s (cluster.start_timeout_seconds): {why}"
            )
        if self.running_since is not None and now - self.running_since > self.limits.run_timeout_seconds:
            raise LaunchError(
                f"job {self.name} ran longer than cluster.run_timeout_seconds = {self.limits.run_timeout_seconds}; "
                "start it again to go on from its last checkpoint"
            )

    def _no_reason(self) -> str:
        if explain.has_condition(self.job, "Suspended"):
            return "the job is suspended, as jobs are that wait in a queue"
        if not self.job.get("status", {}).get("conditions"):
            return "the training operator has not taken it up; check that it runs"
        return "no reason given by the cluster"
