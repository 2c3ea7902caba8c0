"""The result of one check, and the table of all results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import LaunchError

State = Literal["ok", "missing", "no", "unknown"]
COLOURS: dict[State, str] = {"ok": "green", "missing": "yellow", "no": "red", "unknown": "dim"}


@dataclass(frozen=True)
class Finding:
    """`state`: "no" stops every run there, "missing" only runs that need it; "unknown" could not be checked."""

    what: str
    state: State
    detail: str
    remedy: str = ""


def told(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a refusal by the cluster becomes a finding itself."""
    try:
        yield from check()
    except LaunchError as error:
        yield Finding(what, "unknown", str(error))


def show(found: Iterable[Finding], console: Console) -> bool:
    """Print findings; returns False if one of them is a "no"."""
    table = Table(show_header=False, box=None)
    all_good = True
    for finding in found:
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(finding.what, Text(finding.state, style=COLOURS[finding.state]), text)
        all_good &= finding.state != "no"
    console.print(table)
    return all_good
