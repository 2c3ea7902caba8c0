"""`yaongi prepare`: run only the pipeline's data steps, then show their output for the user to judge."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.options import Job, Sets, Workdir, command


class Stage(StrEnum):
    """The data steps after which `prepare` can stop."""

    DOWNLOAD = "download"
    HYGIENE = "hygiene"
    TOKENIZER = "tokenizer"
    SHARDS = "shards"


def prepare(
    job: Job,
    sets: Sets = None,
    until: Annotated[Stage, typer.Option(help="The last step to run.")] = Stage.SHARDS,
    workdir: Workdir = Path("work"),
) -> None:
    """Prepare only a job's data and show how much of each source there is; `run` continues from there."""
    from components.plan.feasible import refuse_hopeless
    from pipelines.data import print_amounts
    from pipelines.run import local_job, run_pipeline
    from pipelines.stopping import ends_at_once
    from trainer.specbase import changes_from_sets

    console, verbose = Console(), bool(os.environ.get("YAONGI_VERBOSE"))
    spec, arguments = local_job(job, changes_from_sets(sets or []), target="local", workdir=workdir)
    refuse_hopeless(spec, train=False)
    with ends_at_once():
        run_pipeline(spec, arguments, logs=workdir / "logs", console=console, verbose=verbose, until=until.value)
        print_amounts(spec, until.value)
    print(f"next: {command('run' if until is Stage.SHARDS else 'prepare', job, workdir, sets)}")
