"""What a person sees of a pipeline that runs here: each step's name, its own lines, its time; nothing of KFP's log.

The steps announce themselves (`components.running`); whatever is printed outside a step is the machinery's and goes to
the log file only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from components.running import DONE, FAILED, STARTED

INDENT = " " * 4  # kfp.local puts it before every line of a step


class Watcher:
    """Follows the output of `pipelines.execute`; afterwards `failure` is the line to show, or "" when none was seen."""

    def __init__(self, console: Console, log: TextIO, *, verbose: bool = False) -> None:
        self.console, self.log, self.verbose = console, log, verbose
        self.step = ""
        self.failure = ""
        self.last_line = ""
        self.seconds: dict[str, float] = {}

    def follow(self, lines: Iterable[str]) -> None:
        """Show and log `lines` until they end."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("starting", total=None)
            for line in lines:
                self.log.write(line)
                self.log.flush()
                before = self.step
                self._show(line.rstrip("\n"))
                if self.step != before:
                    bar.reset(task, description=self.step or "next step")

    def _show(self, line: str) -> None:
        text = line.removeprefix(INDENT).rstrip()
        if text.startswith(STARTED):
            self.step, self.start = text.removeprefix(STARTED), time.monotonic()
            self._print(text, style="bold")
        elif self.step and text.startswith(DONE):
            self.seconds[self.step] = time.monotonic() - self.start
            self._print(text, style="green")
            self.step = ""
        elif self.step and text.startswith(FAILED):
            self.failure, self.step = text, ""
        elif self.verbose:
            self._print(line)
        elif self.step and line.startswith(INDENT) and text:
            self._print(f"  {text}")
        if self.step and line.startswith(INDENT) and text:
            self.last_line = f"{FAILED}{self.step}: {text.strip()}"

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
