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
    told = _saved(now, cluster) + _unclean(now, cluster)
    return f"run {run_id} is {now.state}; nothing of it runs any more ({spent:.0f} s){told}"


def _left(now: Look, cluster: Watched, spent: float) -> str:
    """What still runs, in words; "" for nothing."""
    cleanup = now.step(CLEANUP)
    if workers := cluster.workers():
        return f"the training saves a checkpoint and ends (pods left: {len(workers)})"
    if cleanup and any(_cannot_start(pod.message) for pod in cleanup.pods if pod.phase == "Pending"):
        if cluster.sees or spent > LEASE_SECONDS:
            return ""  # it will never run, and nothing else does
        return "cleanup cannot start, the workers end without it"
    if not now.is_over:
        running = [step.name for step in now.steps if step.state in ("starting", "running")]
        return f"step {running[-1]} has not ended" if running else "the backend ends the run"
    if cluster.sees:
        pods = {pod.name: step.name for step in now.steps for pod in step.pods}
        names = sorted({pods.get(pod, pod) for pod in cluster.steps()[0]})
        return f"step {', '.join(names)} still runs, after the end of the run" if names else ""
    train = now.step("train")
    if cleanup is None or cleanup.state == "succeeded" or train is None or not train.has_begun:
        return ""
    if cleanup.state == "not run":
        return "" if spent > LEASE_SECONDS else "cleanup was not run, the workers end without it"
    # The backend has marked it as failed, perhaps while it was starting; its own log tells whether it is done.
    done = steplog.has_ended(now.lines(cleanup))
    return "" if done or spent > LEASE_SECONDS else "cleanup is running, after the end of the run"


def _cannot_start(message: str) -> bool:
    found = obstacle(message)
    return found is not None and found.pulling


def _saved(now: Look, cluster: Watched) -> str:
    train = now.step("train")
    found = of_lines([*(now.lines(train) if train else []), *cluster.log()]).checkpoint_step
    return f"; the newest checkpoint is of step {found}" if found is not None else ""


def _unclean(now: Look, cluster: Watched) -> str:
    """Why the last step could not do its work; "" if it could."""
    cleanup = now.step(CLEANUP)
    if cleanup is None or cleanup.state == "succeeded":
        return ""
    if lines := now.lines(cleanup):
        return f"; cleanup: error: {steplog.failure(lines, '')}" if steplog.has_failed(lines) else ""
    hindered = cluster.steps()[1] or [found for found in (now.said(cleanup),) if found]
    return f"; cleanup did not run{''.join(f' ({each})' for each in hindered[:1])}, the workers ended without it"
