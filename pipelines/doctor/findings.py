"""One thing that was looked at, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import LaunchError

COLOURS = {"ok": "green", "missing": "yellow", "no": "red", "unknown": "dim"}


@dataclass(frozen=True)
class Finding:
    """`state`: "no" stops every run there, "missing" only what needs it; "unknown" could not be looked at."""

    what: str
    state: Literal["ok", "missing", "no", "unknown"]
    detail: str
    remedy: str = ""


def told(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; where the cluster refuses to answer, that is the finding."""
    try:
        yield from check()
    except LaunchError as error:
        yield Finding(what, "unknown", str(error))


def show(found: Iterable[Finding], console: Console) -> bool:
    """Print findings; False when one of them is a "no"."""
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
