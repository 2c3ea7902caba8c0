"""`yaongi why`: one sentence why a job of the cluster, or a run of this machine, does not run, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import Namespace, Workdir

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # nothing else can be a job's name

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A PyTorchJob or TrainJob, ours or not; a run of this machine; or its beginning."
    ),
]


def why(job: Job, namespace: Namespace = "", workdir: Workdir = Path("work")) -> None:
    """Say in one sentence why a job on the cluster does not run, or how it ended, and what to do about it.

    Without --namespace a run of this machine will do, where the cluster has no such job.
    """
    from components.cluster.kubeconfig import NoCluster
    from pipelines.runs import local as runs
    from trainer.errors import LaunchError

    try:
        print(_on_cluster(job, namespace))
    except (LaunchError, runs.UnknownRun) as there:
        if namespace:
            raise
        try:
            print(_here(job, workdir))
        except runs.UnknownRun as here:
            if not isinstance(there, NoCluster):
                raise there from None
            hint = "set KUBECONFIG to a readable kubeconfig"
            raise LaunchError(f"{here}, and there is no cluster to ask ({there.reason}); {hint}") from None


def _here(run: str, workdir: Path) -> str:
    """What `status` knows.

    Raises:
        UnknownRun, SpecError: none, or several.
    """
    from pipelines.runs import local as runs
    from pipelines.runs import view

    now = view.of_local(runs.find(run, workdir))
    return f"{now.name}, on this machine, is {now.state}" + (f": {now.why}" if now.why else "")


def _on_cluster(job: str, namespace: str) -> str:
    """What the cluster knows.

    Raises:
        LaunchError: no cluster can be asked.
        UnknownRun, SpecError: no such job, or several.
    """
    from components.cluster.kubeconfig import require_cluster

    require_cluster()
    from components.cluster.api import Cluster
    from components.diagnose.gather import jobs, situation
    from components.diagnose.why import why as explain
    from pipelines.runs.local import choose

    cluster = Cluster.connect(namespace or None)
    names = [each["metadata"]["name"] for each in jobs(cluster)]
    if job not in names and any(name.startswith(job) for name in names):
        job = choose(job, names, "")
    found = situation(cluster, job) if DNS_LABEL.fullmatch(job) else None
    if found is None or (found.job is None and not found.pods and not found.events):
        choose(job, names, f"among the jobs of namespace '{cluster.namespace}'")
    return f"{job} is {explain(found)}"
