"""`yaongi why`: one sentence why a job of the cluster does not run, or how it ended, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

Job = Annotated[str, typer.Argument(metavar="JOB", help="A PyTorchJob or TrainJob, ours or not; or its beginning.")]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Kubernetes namespace; without it the kubeconfig context's.")
]


def why(job: Job, namespace: Namespace = "") -> None:
    """Say in one sentence why a job on the cluster does not run, or how it ended, and what to do about it."""
    from components.launch.kubernetes_api import Cluster
    from components.launch.kubernetes_gather import jobs, situation
    from components.launch.kubernetes_why import why as explain
    from pipelines.runs import choose

    cluster = Cluster.connect(namespace or None)
    found = situation(cluster, job)
    if found.job is None and not found.pods and not found.events:
        names = [each["metadata"]["name"] for each in jobs(cluster)]
        found = situation(cluster, choose(job, names, f"among the jobs of namespace '{cluster.namespace}'"))
    print(f"{found.name} is {explain(found)}")
