"""The command `yaongi doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.options import Namespace, Sets, Workdir
from trainer.errors import SpecError


def doctor(
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="Also check a preset or job file.", show_default=False)
    ] = "",
    namespace: Namespace = "",
    sets: Sets = None,
    workdir: Workdir = Path("work"),
    network: Annotated[
        bool, typer.Option("--network", help="Also let pods try what the network policies must pass and stop.")
    ] = False,
) -> None:
    """Check what this machine and the cluster of KUBECONFIG have and lack, and say what to do.

    With JOB, this machine must pass the checks that `run` makes; with --namespace or --set
    cluster.target=kubernetes, the cluster must instead. Exit code 1 if it does not.
    """
    from manifests.spec import load_job
    from pipelines.doctor import kernels, machine
    from pipelines.doctor.findings import show
    from trainer.specbase import changes_from_sets

    if sets and not job:
        raise SpecError("--set changes a job; name the JOB")
    changes = changes_from_sets(sets or [])
    spec = load_job(job, changes) if job else None
    on_cluster = bool(namespace) or (changes.get("cluster") or {}).get("target") == "kubernetes"
    console = Console()
    console.print("this machine", style="bold")
    good = show(machine.findings(workdir), console)
    console.print("its kernels, compared with their references (on a GPU the first time minutes)", style="bold")
    good &= show(kernels.findings(), console)
    if job and not on_cluster:
        console.print(f"{job} on this machine", style="bold", markup=False)
        good &= show(machine.of_job(job, changes, workdir), console)
    console.print("cluster", style="bold")
    from pipelines.doctor import cluster  # its client is slow to import

    good &= show(cluster.findings(namespace or None, spec, is_asked=on_cluster), console)
    if network:
        console.print("network, tried by pods (up to a minute)", style="bold")
        good &= show(cluster.of_network(namespace or None, spec), console)
    if not good:
        raise typer.Exit(1)
