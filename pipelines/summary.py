"""The last thing that `yaongi run` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.summary.step import RunSummary


def show(run: RunSummary, log: Path, console: Console) -> None:
    """Print the run's numbers, places and one sample."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in [*run.rows(), ("log", str(log))]:
        table.add_row(label, Text(value))
    if run.samples:
        prompt, text = run.samples[0]
        table.add_row("sample", Text.assemble((prompt, "bold"), text))
    console.print()
    console.print(Text(run.name, style="bold"))
    console.print(table, soft_wrap=True)
    console.print(f"\n[dim]yaongi generate {run.name} --prompt '…'   continues a text with this model[/dim]")
