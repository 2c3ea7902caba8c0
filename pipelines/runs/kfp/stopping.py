"""Stop a run of the backend, and wait until nothing of it runs.

Terminate kills the running step without a signal. The exit handler's step, cleanup, then deletes the training job; the
backend takes about ten seconds for each of the two pods of that step. It may mark the step as failed while its pod is
still starting; that pod goes on and cleans up after the run has ended. If cleanup cannot start, as when its image is
gone, the workers end by themselves: nobody renews the lease of their launcher. So the end of the run is not the end of
its workers. What is left is seen on the cluster, where a kubeconfig is there and leads to it; else in cleanup's log.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from components.running import CLEANUP
from pipelines.runs.kfp import steplog
from pipelines.runs.kfp.backend import Away
from pipelines.runs.kfp.look import Look, Looker
from pipelines.runs.kfp.obstacle import obstacle
from pipelines.runs.kfp.watched import Watched
from pipelines.runs.standing import of_lines
from trainer.errors import LaunchError

POLL_SECONDS = 2.0
EXTRA_SECONDS = 180  # for the backend's hops, on top of the workers' grace period
LEASE_SECONDS = 60  # after which workers without a launcher have ended, see components/launch/lease.py


def stop(looker: Looker, write: Callable[[str], None]) -> str:
    """Terminate the run and wait. Returns a message for the user.

    Raises:
        LaunchError: it has ended already, the backend refuses, or something still runs after a while.
    """
    backend, run_id, now = looker.backend, looker.run_id, looker.look()
    if now.is_over:
        raise LaunchError(f"run {run_id} has ended already, as {now.state}")
    cluster = Watched(now, write)
    if not now.was_stopped:
        backend.post(f"/apis/v2beta1/runs/{run_id}:terminate", f"to stop run {run_id}")
    begun, told = time.monotonic(), ""
    limit = cluster.where.grace_seconds + EXTRA_SECONDS
    while True:
        spent = time.monotonic() - begun
        try:
            now = looker.look()
        except Away:
            left = "the backend does not answer"
        else:
            left = _left(now, cluster, spent)
        if not left:
            break
        if spent > limit:
            raise LaunchError(
                f"after {spent:.0f} s run {run_id} is {now.state}, and {left}; see: yaongi status {run_id}"
            )
        if left != told:
            write(f"stopping: {left}")
            told = left
        time.sleep(POLL_SECONDS)
    return f"run {run_id} is {now.state}; nothing of it runs any more ({spent:.0f} s){_saved(now)}{_unclean(now)}"


def _left(now: Look, cluster: Watched, spent: float) -> str:
    """What still runs, in words; "" for nothing."""
    cleanup = now.step(CLEANUP)
    if workers := cluster.workers():
        return f"{len(workers)} pods of the training save a checkpoint and end"
    if cleanup and any(_cannot_start(pod.message) for pod in cleanup.pods if pod.phase == "Pending"):
        if cluster.sees or spent > LEASE_SECONDS:
            return ""  # it will never run, and nothing else does
        return "cleanup cannot start, the workers end without it"
    if not now.is_over:
        running = [step.name for step in now.steps if step.state in ("starting", "running")]
        return f"step {running[-1]} is running" if running else "the backend ends the run"
    if cluster.sees:
        pods = {pod.name: step.name for step in now.steps for pod in step.pods}
        names = sorted({pods.get(pod, pod) for pod in cluster.steps()})
        return f"{', '.join(names)} still run, after the end of the run" if names else ""
    if cleanup is None or cleanup.state in ("succeeded", "skipped", "not run"):
        return ""
    # The backend has marked it as failed, perhaps while it was starting; its own log tells whether it is done.
    done = steplog.has_ended(now.lines(cleanup))
    return "" if done or spent > LEASE_SECONDS else "cleanup is running, after the end of the run"


def _cannot_start(message: str) -> bool:
    found = obstacle(message)
    return found is not None and found.pulling


def _saved(now: Look) -> str:
    steps = now.step("train"), now.step(CLEANUP)
    found = of_lines(line for step in steps if step for line in now.lines(step)).checkpoint_step
    return f"; the newest checkpoint is of step {found}" if found is not None else ""


def _unclean(now: Look) -> str:
    """Why the last step could not do its work; "" if it could."""
    cleanup = now.step(CLEANUP)
    if cleanup is None or cleanup.state not in ("starting", "failed"):
        return ""
    if steplog.has_ended(now.lines(cleanup)) and not steplog.has_failed(now.lines(cleanup)):
        return ""
    return f"; cleanup {now.said(cleanup)}"
