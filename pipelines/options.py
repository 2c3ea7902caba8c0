"""Arguments and options that several commands share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[str, typer.Argument(metavar="JOB", help="A preset's name (see `yaongi presets`) or a job file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the job: train.steps=20; repeatable."),
]
WORKDIR = Path("work")
Target = Annotated[str, typer.Option(help="Where the trainer runs: local or kubernetes.")]
Workdir = Annotated[Path, typer.Option(help="Folder for data, checkpoints and logs of local runs.")]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Kubernetes namespace; default: that of the kubeconfig context.")
]


def command(verb: str, what: str, workdir: Path, sets: list[str] | None = None, *options: str) -> str:
    """A complete command for a message, ready to copy and run."""
    return f"yaongi {shlex.join([verb, what, *options])}{again(workdir, sets)}"


def again(workdir: Path, sets: list[str] | None = None) -> str:
    """The options that the user gave, to be repeated in a command that a message names."""
    words = [word for each in sets or [] for word in ("--set", each)]
    words += ["--workdir", str(workdir)] if workdir != WORKDIR else []
    return "".join(f" {shlex.quote(word)}" for word in words)
