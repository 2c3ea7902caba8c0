"""Runs on a cluster: find their jobs, show them, print their logs, stop and resume them.

A run has one job per task of the trainer, labelled with the run's name. A job that yaongi did not create counts as a
run named after the job; it can be inspected, but only its owner stops it.

Numbers come from the log of rank 0: the launcher's rights suffice to read it, while a pod's metrics would need the
right to proxy to any port of any pod.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from components.cluster import kueue, state
from components.cluster.api import Cluster
from components.cluster.watch import LogFollower
from components.diagnose.gather import jobs, situation
from components.diagnose.why import restarts, why
from components.launch import kubernetes
from components.launch.lease import held
from manifests.clusterspec import ClusterSpec
from manifests.kinds import DEVICE_CLAIMS, QUEUE_LABEL, Object, kind_of, pod_template
from manifests.names import PIPELINE_LABEL, RUN_LABEL, TASK_LABEL
from manifests.queue import before_admission, without_patches
from pipelines.options import again
from pipelines.runs.kept import Kept, keep, kept, run_dir_of
from pipelines.runs.names import choose
from pipelines.runs.standing import PUBLISHED, of_log
from pipelines.runs.view import View
from trainer.errors import LaunchError
from trainer.recording.trackers.state import links_in

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # the form of every job name
TAIL_LINES = 2000  # enough to include the line of a checkpoint
ALL_LINES = 10_000_000
POLL_SECONDS = 2.0
_write = partial(print, flush=True)


@dataclass(frozen=True)
class ClusterRun:
    """A run with its jobs by task; a job that is not ours has the task train.

    Attributes:
        workdir: where the objects of stopped jobs are kept.
        stopped: its training job as kept there; the cluster may then have no job.
    """

    name: str
    cluster: Cluster
    workdir: Path
    jobs: dict[str, Object] = field(default_factory=dict)
    stopped: Kept | None = None

    def job(self, task: str = "") -> Object:
        """The job of a task, or the newest job.

        Raises:
            LaunchError: the task has no job.
        """
        if task and task not in self.jobs:
            raise LaunchError(f"run {self.name} has no job for '{task}'; it has: {', '.join(self.jobs)}")
        return (
            self.jobs[task] if task else max(self.jobs.values(), key=lambda job: job["metadata"]["creationTimestamp"])
        )

    def view(self) -> View:
        return find(self.name, self.cluster, self.workdir).as_found()

    def as_found(self) -> View:
        """Its progress, from the jobs it was found with."""
        job, cluster = self.job(), self.cluster
        task, name = job["metadata"].get("labels", {}).get(TASK_LABEL, "train"), job["metadata"]["name"]
        found = situation(cluster, name, job)
        answer = why(found)
        lines: list[str] = []
        # Of a finished run the newest job is the export's: the numbers are still those of the training.
        if trained := self.jobs.get("train"):
            kind, its = kind_of(trained), trained["metadata"]["name"]
            for pod in _of_index(found.pods if its == name else cluster.pods(kind, its), kind.index_label, 0):
                lines = cluster.log_tail(
                    pod["metadata"]["name"], TAIL_LINES, timestamps=True, container=_container(pod)
                )
        plain = answer.state in ("running", "succeeded") and "restarted" not in answer.sentence
        said = "" if plain else f"{answer.sentence}; {answer.fix}" if answer.fix else answer.sentence
        rows = [("job", f"{job['kind']} {name}"), ("task", task)]
        rows += [("pod", _where(pod)) for pod in found.pods]
        rows += links_in(line.partition(" ")[2] for line in lines).items()  # after the kubelet's timestamp
        numbers = replace(of_log(lines, datetime.now(UTC)), restarts=restarts(found))
        return View(self.name, f"namespace {cluster.namespace}", answer.state, said, numbers, rows)

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        """The log of the pod that a rank runs in, preceded by that of the container before a restart."""
        job, cluster = self.job(task), self.cluster
        kind, name = kind_of(job), job["metadata"]["name"]
        index = (rank or 0) // _ranks_per_pod(job)
        follower = LogFollower(cluster, _write)
        if follow:
            follower.start()
        told: set[str] = set()
        while True:
            current = cluster.get(kind.kind, name)
            pods = _of_index(cluster.pods(kind, name), kind.index_label, index)
            for pod in pods:
                if state.container_status(pod).get("restartCount") and pod["metadata"]["uid"] not in told:
                    told.add(pod["metadata"]["uid"])
                    for line in _lines(cluster, pod, previous=True):
                        _write(line)
                if not follow:
                    for line in _lines(cluster, pod):
                        _write(line)
                elif state.has_started(pod):
                    follower.add(pod)
                if state.is_over(pod):
                    follower.ended(pod["metadata"]["uid"])
            if not follow:
                if not pods:
                    raise LaunchError(f"job {name} has no pod for rank {rank or 0}; see: yaongi why {name}")
                return
            if current is None or not state.is_active(current):
                follower.finish(15)
                return
            time.sleep(POLL_SECONDS)

    def stop(self, write: Callable[[str], None]) -> str:
        """Delete its jobs, whose workers save a checkpoint first, and wait until no pod is left.

        Jobs are deleted, not suspended, because a queue would resume a suspended job at once. Their objects are kept in
        the workdir for `resume`.
        """
        cluster, place = self.cluster, f"-n {self.cluster.namespace}"
        active = [job for job in self.jobs.values() if state.is_active(job)]
        if not active:
            raise LaunchError(f"run {self.name} is not running in namespace '{cluster.namespace}'")
        saved = "none of its pods was running yet"
        for job in active:
            kind, name = kind_of(job), job["metadata"]["name"]
            if RUN_LABEL not in job["metadata"].get("labels", {}):
                raise LaunchError(
                    f"job {name} was not made by yaongi; stop it with: kubectl delete {kind.plural} {name} {place}"
                )
            keep(self.workdir, cluster.namespace, _objects(cluster, job))
            lines: list[str] = []
            follower = LogFollower(cluster, lines.append)
            follower.start()
            pods = cluster.pods(kind, name)
            for pod in _of_index(pods, kind.index_label, 0):
                if state.has_started(pod):
                    follower.add(pod)
            grace = max((pod["spec"].get("terminationGracePeriodSeconds", 30) for pod in pods), default=30)
            gone = kubernetes.stop(cluster, kind, name, grace, lambda line: write(line.removeprefix("launcher: ")))
            follower.finish(5)
            steps = [match[1] for match in map(PUBLISHED.match, lines) if match]
            if steps:
                saved = f"the newest checkpoint is of step {steps[-1]}"
            elif pods:  # else it waited in a queue, perhaps with a checkpoint of before
                saved = "it had saved no checkpoint yet"
            if not gone:
                raise LaunchError(f"job {name} may still run; see: yaongi why {name} {place}")
        return f"stopped {self.name}; {saved}; continue: yaongi resume {self.name} {place}{again(self.workdir)}"

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        """Create its training job again, from what `stop` kept or from a failed job; unsuspend a suspended one."""
        if sets:
            raise LaunchError(
                "--set: a cluster's job is created again unchanged, without new data; to change it, use yaongi run or "
                "submit JOB --set …, which continue the run on the volume"
            )
        name, place = self._made_again(write), f"-n {self.cluster.namespace}"
        return f"job {name} continues; follow it: yaongi logs {name} {place} --follow; how far: yaongi status {place}"

    def why(self) -> str:
        name = self.job()["metadata"]["name"] if self.jobs else self.name
        return f"{name} is {why(situation(self.cluster, name))}"

    def _made_again(self, write: Callable[[str], None]) -> str:
        """Returns the job's name."""
        cluster, stopped = self.cluster, self.stopped
        if not self.jobs:
            assert stopped is not None
            objects = stopped.objects()
        else:
            job = self.job("train")
            if state.has_succeeded(job):
                raise LaunchError(f"run {self.name} has finished training; there is nothing to resume")
            if state.is_suspended(job) and state.is_active(job):
                self._freed(job)
                return job["metadata"]["name"]
            objects = _objects(cluster, job)
            if not state.is_active(job):  # the old job is deleted first; if the new one fails, only this is left
                stopped = keep(self.workdir, cluster.namespace, objects)
        with _lease_of(objects):
            kubernetes.start(cluster, objects, ClusterSpec(), write)
        if stopped:
            stopped.file.unlink()
        return objects[-1]["metadata"]["name"]

    def _freed(self, job: Object) -> None:
        """Let a suspended job run; only its queue admits one that is in a queue."""
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
        if queue is None:
            self.cluster.unsuspend(job)
            return
        workload = kueue.workload_of(self.cluster, job)
        if workload is None or workload["spec"].get("active", True):
            raise LaunchError(
                f"run {self.name} waits in queue '{queue}' and starts by itself when there is room; what it waits for: "
                f"yaongi why {job['metadata']['name']} -n {self.cluster.namespace}"
            )
        kueue.activate(self.cluster, workload)


def cluster_runs(cluster: Cluster, workdir: Path) -> dict[str, ClusterRun]:
    """All runs that have jobs in the namespace, by name."""
    found: dict[str, ClusterRun] = {}
    for job in jobs(cluster):
        labels = job["metadata"].get("labels", {})
        name = labels.get(RUN_LABEL, job["metadata"]["name"])
        found.setdefault(name, ClusterRun(name, cluster, workdir)).jobs[labels.get(TASK_LABEL, "train")] = job
    return dict(sorted(found.items()))


def find(text: str, cluster: Cluster, workdir: Path, exactly: str | None = None) -> ClusterRun:
    """The run that `text` names, or the only one whose name begins with it.

    Raises:
        UnknownRun, SpecError: none, or several.
    """
    runs = cluster_runs(cluster, workdir)
    return runs[choose(text, runs, f"in namespace '{cluster.namespace}'", exactly)]


def find_also_stopped(text: str, cluster: Cluster, workdir: Path, exactly: str | None = None) -> ClusterRun:
    """As `find`, but includes runs that were stopped from the workdir; the cluster no longer knows them."""
    runs, stopped = cluster_runs(cluster, workdir), {each.name: each for each in kept(workdir, cluster.namespace)}
    where = f"in namespace '{cluster.namespace}', nor stopped there from {workdir}"
    name = choose(text, {*runs, *stopped}, where, exactly)
    return replace(runs.get(name, ClusterRun(name, cluster, workdir)), stopped=stopped.get(name))


def find_job(text: str, cluster: Cluster, workdir: Path) -> ClusterRun:
    """A single job, ours or not, by its name or its beginning; also a deleted one that still has pods or events.

    Raises:
        UnknownRun, SpecError: none, or several.
    """
    there = {job["metadata"]["name"]: job for job in jobs(cluster)}
    if text not in there and any(name.startswith(text) for name in there):
        text = choose(text, there, "")
    if text in there:
        return ClusterRun(text, cluster, workdir, {"train": there[text]})
    found = situation(cluster, text) if DNS_LABEL.fullmatch(text) else None
    if found is None or not (found.job or found.pods or found.events):
        choose(text, there, f"among the jobs of namespace '{cluster.namespace}'")
    return ClusterRun(text, cluster, workdir)


def _lease_of(objects: list[Object]) -> AbstractContextManager[object]:
    """Refuse while a launcher is alive; remove the lease of a dead one, which would end the new job at once.

    Only where the volume is mounted here.
    """
    run_dir = run_dir_of(objects)
    return held(run_dir) if run_dir and Path(run_dir).is_dir() else nullcontext()


def _objects(cluster: Cluster, job: Object) -> list[Object]:
    """The job and the objects it needs as they were created, without what the cluster and a launcher added."""
    name = job["metadata"]["name"]
    plain = cluster.core.api_client.sanitize_for_serialization  # core resources come as the client's classes
    needs = [plain(need) | {"kind": kind} for kind in kind_of(job).needs if (need := cluster.get(kind, name))]
    if "resourceClaims" in pod_template([*needs, job])["spec"] and (claims := cluster.get(DEVICE_CLAIMS.kind, name)):
        needs.append(claims)
    if QUEUE_LABEL in job["metadata"].get("labels", {}):
        job = before_admission(job, kueue.workload_of(cluster, job))
    else:
        job = without_patches(job)
    return [_as_made(item) for item in (*needs, job)]


def _as_made(body: Object) -> Object:
    metadata = {key: body["metadata"][key] for key in ("name", "labels", "annotations") if body["metadata"].get(key)}
    metadata["labels"] = {key: value for key, value in metadata.get("labels", {}).items() if key != PIPELINE_LABEL}
    kept = {key: value for key, value in body.items() if key in ("apiVersion", "kind", "spec", "data")}
    return kept | {"metadata": metadata}


def _ranks_per_pod(job: Object) -> int:
    spec = job["spec"]
    number = str(spec.get("nprocPerNode") or spec.get("trainer", {}).get("numProcPerNode") or 1)
    return int(number) if number.isdigit() else 1


def _of_index(pods: list[Object], label: str, index: int) -> list[Object]:
    return [pod for pod in pods if pod["metadata"]["labels"].get(label) == str(index)]


def _container(pod: Object) -> str:
    return state.container(pod)["name"]


def _lines(cluster: Cluster, pod: Object, **options: Any) -> list[str]:
    return cluster.log_tail(pod["metadata"]["name"], ALL_LINES, container=_container(pod), **options)


def _where(pod: Object) -> str:
    status = pod.get("status", {})
    return f"{pod['metadata']['name']} on {pod['spec'].get('nodeName', 'no node')}: {status.get('phase', 'unknown')}"
