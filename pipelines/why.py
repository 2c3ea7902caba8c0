"""`yaongi why`: one sentence why a job of the cluster does not run, or how it ended, and what to do."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from pipelines.options import Namespace

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # nothing else can be a job's name

Job = Annotated[str, typer.Argument(metavar="JOB", help="A PyTorchJob or TrainJob, ours or not; or its beginning.")]


def why(job: Job, namespace: Namespace = "") -> None:
    """Say in one sentence why a job on the cluster does not run, or how it ended, and what to do about it."""
    from components.launch.kubeconfig import require_cluster

    require_cluster()
    from components.launch.kubernetes_api import Cluster
    from components.launch.kubernetes_gather import jobs, situation
    from components.launch.kubernetes_why import why as explain
    from pipelines.runs import choose

    cluster = Cluster.connect(namespace or None)
    names = [each["metadata"]["name"] for each in jobs(cluster)]
    if job not in names and any(name.startswith(job) for name in names):
        job = choose(job, names, "")
    found = situation(cluster, job) if DNS_LABEL.fullmatch(job) else None
    if found is None or (found.job is None and not found.pods and not found.events):
        choose(job, names, f"among the jobs of namespace '{cluster.namespace}'")
    print(f"{job} is {explain(found)}")
