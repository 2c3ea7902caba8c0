"""Stop the jobs that a pipeline run left running on the cluster.

This is the exit handler's step: it runs after the others however they ended. A launcher that ended normally has deleted
its job; one that was killed has not, and its pod object, which owns the job, still exists. Jobs that have ended are
kept for inspection. So is a job that the launcher of another run has adopted, because adoption changes its label.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from components.cluster import state
from components.cluster.api import Cluster
from components.launch.kubernetes import show
from manifests.clusterspec import ClusterSpec
from manifests.kinds import KINDS
from manifests.names import PIPELINE_LABEL
from trainer.errors import LaunchError

EXTRA_SECONDS = 60  # time that a node needs to remove a pod, on top of the grace period


def run(pipeline_run: str, where: ClusterSpec, write: Callable[[str], None] = show) -> None:
    """Delete the running jobs of a pipeline run and wait until none of its pods runs.

    Args:
        pipeline_run: the run id with which its launchers labelled their jobs.
        where: kind and namespace of the jobs, and how long their workers have to save a checkpoint.

    Raises:
        LaunchError: the cluster refuses, or pods do not end.
    """
    cleanup(Cluster.connect(where.namespace), pipeline_run, where, write)


def cleanup(cluster: Cluster, pipeline_run: str, where: ClusterSpec, write: Callable[[str], None]) -> None:
    """As `run`."""
    kind = KINDS[where.job]
    selector = f"{PIPELINE_LABEL}={pipeline_run}"
    deleted: set[str] = set()
    begun = time.monotonic()
    while True:
        jobs = cluster.jobs(kind, selector)
        running = [job for job in jobs if state.is_active(job)]
        for job in running:
            if "deletionTimestamp" not in job["metadata"] and cluster.delete_unchanged(job):
                name = job["metadata"]["name"]
                deleted.add(name)
                write(f"deleted job {name}; its workers have {where.grace_seconds} s to save a checkpoint")
        names = sorted(deleted | {job["metadata"]["name"] for job in jobs})
        pods = [p["metadata"]["name"] for name in names for p in cluster.pods(kind, name) if not state.is_over(p)]
        spent = time.monotonic() - begun
        if not running and not pods:
            break
        if spent > where.grace_seconds + EXTRA_SECONDS:
            raise LaunchError(
                f"after {spent:.0f} s these still run: {', '.join(pods) or ', '.join(names)}; a node may be "
                f"lost: kubectl delete pod -n {cluster.namespace} --force --grace-period=0 <pod>"
            )
        time.sleep(1)
    write(f"no worker runs any more ({spent:.0f} s)" if deleted else "this run left no job running")
