"""`yaongi local`, `status`, `logs`, `stop`, `resume` and `why`: what people do with runs once they exist."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipelines.options import Job, Sets, Workdir, again
from pipelines.why import why

if TYPE_CHECKING:
    from manifests.spec import JobSpec
    from pipelines.background import Process

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name or its beginning, its directory, a preset or job file.")
]
Namespace = Annotated[
    str,
    typer.Option("--namespace", "-n", help="Look on the cluster, in this namespace; else there for unknown runs only."),
]
Host = Annotated[
    str, typer.Option(envvar="KFP_HOST", help="Kubeflow Pipelines, http://…, where RUN is the id of a run there.")
]
WIDE = 200  # characters of a table's lines where nothing is on a terminal


def register(app: typer.Typer) -> None:
    for command in (local, status, logs, stop, resume, why):
        app.command()(command)


def local(job: Job, sets: Sets = None, workdir: Workdir = Path("work")) -> None:
    """Run the whole pipeline on this machine in the background; it outlives the terminal."""
    from pipelines import background
    from pipelines.run import local_job
    from trainer.specbase import changes_from_sets

    changes = changes_from_sets(sets or [])
    spec, _ = local_job(job, changes, target="local", workdir=workdir)
    if not background.is_alive(workdir, spec.run_name):  # else it is the run's own ports that are taken
        from pipelines.ports import written
        from pipelines.refusals import refuse

        refuse(spec, written(job, changes))
    _say_started(background.start(spec, workdir, Path.cwd()), workdir)


def status(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="As for `logs`; without it all runs.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every two seconds until the run ends.")] = False,
    namespace: Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """How far runs are, how fast, when they end, and why one does not run."""
    from rich.live import Live

    from pipelines.runs import find as everywhere
    from pipelines.runs import view

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    _check_host(context, run)
    if not run:
        views = everywhere.all_views(namespace, workdir, console)
        where = f"namespace {namespace}" if namespace else workdir
        console.print(view.table(views) if views else f"no runs in {where}", soft_wrap=True)
        for each in views:
            if each.why and each.state != "running":
                console.print(f"{each.name}: {each.why}", soft_wrap=True, highlight=False, markup=False)
        return
    look = everywhere.looking_at(run, namespace, workdir, host)
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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="A rank's own log of the training.")] = None,
    task: Annotated[str, typer.Option(help="Only one step: train, evaluate, export, or here a data step.")] = "",
    namespace: Namespace = "",
    host: Host = "",
    workdir: Workdir = Path("work"),
) -> None:
    """What a run has printed: here its pipeline, on the cluster the trainer."""
    from pipelines.runs import find as everywhere
    from pipelines.runs import locallogs
    from pipelines.runs.local import Run as LocalRun

    _check_host(context, run)
    if everywhere.is_kfp(run):
        from pipelines.runs import kfp as kfp_runs

        if follow:
            kfp_runs.follow(kfp_runs.connect(host), run, Console())
        kfp_runs.show_logs(host, run, print, task=task)
        return
    found = everywhere.find(run, namespace, workdir)
    if isinstance(found, LocalRun):
        locallogs.show(found, Console(), follow=follow, rank=rank, task=task)
        return
    from pipelines.runs import cluster as remote

    remote.show_logs(found, lambda line: print(line, flush=True), follow=follow, rank=rank, task=task)


def stop(
    context: typer.Context, run: Run, namespace: Namespace = "", host: Host = "", workdir: Workdir = Path("work")
) -> None:
    """Stop a run; a training saves a checkpoint first, from which `resume` goes on."""
    from pipelines import background
    from pipelines.runs import find as everywhere
    from pipelines.runs import view
    from pipelines.runs.local import Run as LocalRun
    from trainer.checkpoints.checkpoint import latest_step

    _check_host(context, run)
    if everywhere.is_kfp(run):
        from pipelines.runs import kfp as kfp_runs

        print(f"run {run} ended as {kfp_runs.stop(host, run)}; submit its job again to continue")
        return
    found = everywhere.find(run, namespace, workdir)
    if isinstance(found, LocalRun):
        job = found.job()
        directory = Path(job.run_dir) if job else found.directory  # that of a cluster's volume for a training there
        before = latest_step(directory)

        def present() -> str:
            return view.present_step(background.read(workdir, found.name), view.newest_log(found))

        ended = background.stop(workdir, found.name, present, print)
        if ended.code == 0:
            name = found.name
            print(f"run {name} finished before it could be stopped; see: yaongi status {name}{again(workdir)}")
            return
        step = latest_step(directory)
        new = "checkpoint saved" if step > before else "the newest checkpoint is"
        saved, where = f"{new} at step {step}" if step else "it has no checkpoint yet", ""
    else:
        from pipelines.runs import cluster as remote

        saved, where = remote.stop(found, workdir, print), f" -n {found.cluster.namespace}"
    print(f"stopped {found.name}; {saved}; continue: yaongi resume {found.name}{where}{again(workdir)}")


def resume(run: Run, sets: Sets = None, namespace: Namespace = "", workdir: Workdir = Path("work")) -> None:
    """Start a stopped or failed run again from its last checkpoint, in the background or as a job of the cluster.

    --set train.steps=N makes it longer, a finished run too: from its last checkpoint before the learning rate falls.
    """
    from pipelines import background
    from pipelines.runs import find as everywhere
    from pipelines.runs import local as runs
    from trainer.errors import LaunchError
    from trainer.process.limits import LEASE

    found, cluster = everywhere.find_or_ask(run, namespace, workdir)
    if cluster is not None:
        if sets:
            raise LaunchError(
                "--set: a cluster's job is made again as it was, without new data; change it by yaongi run or submit "
                "JOB --set …, which go on with the run that is on the volume"
            )
        from pipelines.runs import cluster as remote

        name = remote.resume(run, cluster, workdir, print, exactly=runs.named(run, workdir))
        place = f"-n {cluster.namespace}"
        print(f"job {name} goes on; follow it: yaongi logs {name} {place} --follow; how far: yaongi status {place}")
        return
    assert found is not None
    spec = found.job()
    if spec is None:
        raise LaunchError(
            f"run {found.name}: neither {found.directory} nor {workdir} holds its job; start that: "
            f"yaongi local JOB{again(workdir)}"
        )
    if (found.directory / LEASE).exists():
        from components.launch.lease import held

        with held(found.directory):  # refuses while a launcher is alive
            pass
    if sets:
        from components.plan.length import changed
        from trainer.specbase import changes_from_sets

        spec = changed(spec, changes_from_sets(sets), found.name)
    if _is_finished(spec):
        print(f"run {found.name} is finished: {spec.train.steps:,} steps, model in {found.directory / 'export'}")
        return
    process = background.read(workdir, found.name)
    _say_started(background.start(spec, workdir, Path(process.cwd) if process else Path.cwd()), workdir)


def _is_finished(job: JobSpec) -> bool:
    """Whether nothing of a local run is left to do, by what lies in its directory."""
    from typing import get_args

    from components.launch.artefacts import Task, finished

    return all(finished(job, task) for task in get_args(Task))


def _check_host(context: typer.Context, run: str) -> None:
    """Refuse --host for what is no run of that host. KFP_HOST in the environment may be meant for other runs.

    Raises:
        SpecError
    """
    from pipelines.runs.find import is_kfp
    from trainer.specbase import SpecError

    source = context.get_parameter_source("host")
    if source is None or source.name != "COMMANDLINE" or is_kfp(run):
        return
    given = f"'{run}' is none" if run else "RUN is missing"
    raise SpecError(
        f"--host: a run on Kubeflow Pipelines is named by its whole id, and {given}; give the id that its page's "
        "address ends in, or leave out --host"
    )


def _say_started(process: Process, workdir: Path) -> None:
    print(f"run {process.run} runs in the background (process {process.pid})")
    place = again(workdir)
    print(
        f"follow it: yaongi logs {process.run} --follow{place}; how far: yaongi status{place}; "
        f"end it: yaongi stop {process.run}{place}"
    )
