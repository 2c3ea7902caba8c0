"""`yaongi local`, `status`, `logs`, `stop`, `resume` and `why`: what people do with runs once they exist."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.why import why

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name or its beginning, its directory, a preset or job file.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A preset's name (see `yaongi presets`) or a job file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field: train.steps=20; repeatable."),
]
Workdir = Annotated[Path, typer.Option(help="Folder for data, checkpoints and logs of local runs.")]
WIDE = 200  # characters of a table's lines where nothing is on a terminal


def register(app: typer.Typer) -> None:
    for command in (local, status, logs, stop, resume, why):
        app.command()(command)


def local(job: Job, sets: Sets = None, workdir: Workdir = Path("work")) -> None:
    """Run the whole pipeline on this machine in the background; it outlives the terminal."""
    from pipelines import background
    from pipelines.run import local_job
    from trainer.specbase import changes_from_sets

    spec, _ = local_job(job, changes_from_sets(sets or []), target="local", workdir=workdir)
    _say_started(background.start(spec, workdir, Path.cwd()))


def status(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="As for `logs`; without it all runs.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every two seconds until the run ends.")] = False,
    workdir: Workdir = Path("work"),
) -> None:
    """How far runs are, how fast, when they end, and why one does not run."""
    from rich.live import Live

    from pipelines import runs, view

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    if not run:
        views = [view.of_local(each) for each in runs.local_runs(workdir).values()]
        console.print(view.table(views) if views else f"no runs in {workdir}", soft_wrap=True)
        return
    found = runs.find(run, workdir)
    shown = view.of_local(found)
    if not watch:
        console.print(view.details(shown), soft_wrap=True)
        return
    with Live(view.details(shown), console=console, auto_refresh=False) as live:
        while not shown.is_over:
            time.sleep(2)
            shown = view.of_local(found)
            live.update(view.details(shown), refresh=True)


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="A rank's own log of the training.")] = None,
    task: Annotated[str, typer.Option(help="Only one step: train, evaluate, export, or a data step.")] = "",
    workdir: Workdir = Path("work"),
) -> None:
    """What a run has printed."""
    from pipelines import locallogs, runs

    locallogs.show(runs.find(run, workdir), Console(), follow=follow, rank=rank, task=task)


def stop(run: Run, workdir: Workdir = Path("work")) -> None:
    """Stop a run; a training saves a checkpoint, from which `resume` goes on."""
    from pipelines import background, runs
    from trainer.checkpoint import latest_step

    found = runs.find(run, workdir)
    before = latest_step(found.directory)
    background.stop(workdir, found.name)
    step = latest_step(found.directory)
    new = "checkpoint saved" if step > before else "the newest checkpoint is"
    saved = f"{new} at step {step}" if step else "it has no checkpoint yet"
    print(f"stopped {found.name}; {saved}; continue: yaongi resume {found.name}")


def resume(run: Run, workdir: Workdir = Path("work")) -> None:
    """Start a stopped or failed run again, in the background, from its last checkpoint."""
    from components.launch import LaunchError
    from pipelines import background, runs
    from trainer.limits import lease_expires

    found = runs.find(run, workdir)
    spec = found.job()
    if spec is None:
        raise LaunchError(f"run {found.name}: neither {found.directory} nor {workdir} holds its job; yaongi local JOB")
    expires = lease_expires(found.directory)
    if expires is not None and expires > time.time():
        raise LaunchError(f"a launcher follows run {found.name}: its lease is alive; wait for it or stop it")
    process = background.read(workdir, found.name)
    _say_started(background.start(spec, workdir, Path(process.cwd) if process else Path.cwd()))


def _say_started(process: object) -> None:
    from pipelines.background import Process

    assert isinstance(process, Process)
    print(f"run {process.run} runs in the background (process {process.pid})")
    print(f"follow it: yaongi logs {process.run} --follow; how far: yaongi status; end it: yaongi stop {process.run}")
