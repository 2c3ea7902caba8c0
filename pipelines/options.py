"""Arguments and options that several commands take, each with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[str, typer.Argument(metavar="JOB", help="A preset's name (see `yaongi presets`) or a job file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the job: train.steps=20; repeatable."),
]
Workdir = Annotated[Path, typer.Option(help="Folder for data, checkpoints and logs of local runs.")]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Kubernetes namespace; without it the kubeconfig context's.")
]
