"""`yaongi local`, `status`, `logs`, `stop`, `resume` and `why`: the commands for runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines import options
from pipelines.options import Job, Sets, Workdir

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name or its beginning, its directory, a preset or job file.")
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace", "-n", help="Look in this namespace of the cluster; default: only for runs unknown here."
    ),
]
Host = Annotated[
    str, typer.Option(envvar="KFP_HOST", help="Kubeflow Pipelines, http://…, if RUN is the id of a run there.")
]
WIDE = 200  # characters in a table line when stdout is not a terminal


def register(app: typer.Typer) -> None:
    for command in (local, status, logs, stop, resume, why):
        app.command()(command)


def local(job: Job, sets: Sets = None, workdir: Workdir = Path("work")) -> None:
    """Run the whole pipeline on this machine in the background; it outlives the terminal."""
    from pipelines import background
    from pipelines.run import local_job
    from pipelines.runs.local import started
    from trainer.specbase import changes_from_sets

    changes = changes_from_sets(sets or [])
    spec, _ = local_job(job, changes, target="local", workdir=workdir)
    if not background.is_alive(workdir, spec.run_name):  # a live run holds its ports itself
        from pipelines.ports import written
        from pipelines.refusals import refuse, remarks

        refuse(spec, written(job, changes))
        for line in remarks(spec):
            print(f"warning: {line}", file=sys.stderr)
    print(started(background.start(spec, workdir, Path.cwd()), workdir))


def status(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="As for `logs`; default: all runs.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until the run ends.")] = False,
    namespace: Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """Show the progress, speed and remaining time of runs, and why one does not run."""
    from rich.live import Live

    from pipelines.runs import find, view

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    _check_host(context, run)
    where = find.Where(namespace, workdir, host)
    if not run:
        views = find.all_views(where, console)
        place = f"namespace {namespace}" if namespace else workdir
        console.print(view.table(views) if views else f"no runs in {place}", soft_wrap=True)
        for each in views:
            if each.why and each.state != "running":
                console.print(f"{each.name}: {each.why}", soft_wrap=True, highlight=False, markup=False)
        return
    look = find.looking_at(run, where)
    shown = look()
    if not watch:
        console.print(view.details(shown), soft_wrap=True)
        return
    with Live(view.details(shown), console=console, auto_refresh=False) as live:
        while not shown.is_over:
            time.sleep(2)
            shown = look()
            live.update(view.details(shown), refresh=True)


def logs(
    context: typer.Context,
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only the training log of this rank.")] = None,
    task: Annotated[
        str, typer.Option(help="Only one step: train, evaluate, export or, of a pipeline, any other.")
    ] = "",
    namespace: Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """Print a run's log: of its pipeline on this machine or on Kubeflow Pipelines, of the trainer on the cluster."""
    from pipelines.runs.find import Where, find

    _check_host(context, run)
    find(run, Where(namespace, workdir, host)).show_logs(Console(), follow=follow, rank=rank, task=task)


def stop(
    context: typer.Context, run: Run, namespace: Namespace = "", host: Host = "", workdir: Workdir = Path("work")
) -> None:
    """Stop a run. Training saves a checkpoint first; `resume` continues from it."""
    from pipelines.runs.find import Where, find

    _check_host(context, run)
    print(find(run, Where(namespace, workdir, host)).stop(print))


def resume(
    context: typer.Context,
    run: Run,
    sets: Sets = None,
    namespace: Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """Start a stopped or failed run again from its last checkpoint, in the background or as a job of the cluster.

    --set train.steps=N lengthens a run, even a finished one: from its last checkpoint before the learning rate falls.
    """
    from pipelines.runs.find import Where, find

    _check_host(context, run)
    print(find(run, Where(namespace, workdir, host), also_stopped=True).resume(sets or [], print))


def why(
    context: typer.Context,
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="A PyTorchJob or TrainJob, ours or not; a run of this machine; or its beginning."
        ),
    ],
    namespace: options.Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """Say in one sentence why a job on the cluster does not run, or how it ended, and what to do about it.

    Without --namespace, a run of this machine is explained if the cluster has no such job.
    """
    from pipelines.runs.find import Where, find_to_explain

    _check_host(context, job)
    print(find_to_explain(job, Where(namespace, workdir, host)).why())


def _check_host(context: typer.Context, run: str) -> None:
    """Refuse --host if `run` is not the id of a run there. KFP_HOST in the environment may be meant for other runs.

    Raises:
        SpecError: as above.
    """
    from pipelines.runs.find import is_kfp
    from trainer.errors import SpecError

    source = context.get_parameter_source("host")
    if source is None or source.name != "COMMANDLINE" or is_kfp(run):
        return
    given = f"'{run}' is none" if run else "RUN is missing"
    raise SpecError(
        f"--host: a run on Kubeflow Pipelines is named by its whole id, and {given}; give the id that its page's "
        "address ends in, or leave out --host"
    )
