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
        str, typer.Argument(metavar="JOB", help="Check the cluster against a preset or job file.", show_default=False)
    ] = "",
    namespace: Namespace = "",
    sets: Sets = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Check what this machine and the cluster of KUBECONFIG have and lack, and what to do.

    With JOB or --namespace the cluster has to be fit for runs too: exit code 1 if it is not.
    """
    from manifests.spec import load_job
    from pipelines.doctor import machine
    from pipelines.doctor.findings import show
    from trainer.specbase import changes_from_sets

    if sets and not job:
        raise SpecError("--set changes a job; name the JOB")
    spec = load_job(job, changes_from_sets(sets or [])) if job else None
    console = Console()
    console.print("this machine", style="bold")
    good = show(machine.findings(workdir), console)
    console.print("cluster", style="bold")
    from pipelines.doctor import cluster  # with a client that takes its time

    good &= show(cluster.findings(namespace or None, spec, is_asked=bool(job or namespace)), console)
    if not good:
        raise typer.Exit(1)
