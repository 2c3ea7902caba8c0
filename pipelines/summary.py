"""The summary that `yaongi run` prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from components.summary.step import RunSummary
from pipelines.options import again


def show(run: RunSummary, log: Path, console: Console, workdir: Path, *, chat: bool = False) -> None:
    """Print the run's numbers, paths and one sample; lines are never wrapped, so that paths can be copied.

    Args:
        chat: the samples are questions and answers.
    """
    console.print(Text(f"\n{run.name}", style="bold green"))
    for label, value in [*run.rows(), ("log", str(log))]:
        console.print(Text.assemble((f"{label:<16}", "bold"), value), soft_wrap=True)
    for prompt, text in run.samples[:1]:
        told = f"{' → ' if chat else ''}{text}".replace("\n", " ")
        console.print(Text.assemble(("sample          ", "bold"), (prompt, "underline"), told), soft_wrap=True)
    console.print(f"\nto {'ask' if chat else 'continue a text with'} this model:", style="dim")
    options = f"{'--chat ' if chat else ''}--prompt '…'{again(workdir)}"
    console.print(Text(f"yaongi generate {run.name} {options}", style="dim"), soft_wrap=True)
