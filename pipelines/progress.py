"""The console output of a local pipeline: each step's name, its lines and its time, without KFP's own log.

The steps print marks (`components.running`); anything printed outside a step comes from KFP and goes to the log file
only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from components.marks import DONE, FAILED, STARTED
from trainer.exitcodes import ExitCode

# What kfp.local prints for a step that died, even if the step itself printed nothing.
TASK_FAILED = re.compile(r"Task \S+ finished with status \S*FAILURE")
ONCE = re.compile(r"operation |metrics ")  # printed by every step or task, mostly with the same words
INDENT = " " * 4  # kfp.local puts it before every line of a step, once per level of nesting


class Watcher:
    """Follows the output of `pipelines.execute`; then `failure` says which step failed and why ("" if none said so),
    `code` its exit code."""

    def __init__(self, console: Console, log: TextIO, *, verbose: bool = False) -> None:
        self.console, self.log, self.verbose = console, log, verbose
        self.running: dict[str, float] = {}  # step → start time; several if a loop runs steps in parallel
        self.indent = INDENT
        self.failure = ""
        self.code: int = ExitCode.UNEXPECTED
        self.last_line = ""
        self.in_traceback = False
        self.said: set[str] = set()
        self.seconds: dict[str, float] = {}

    @property
    def step(self) -> str:
        """The running step that started last, else ""."""
        return next(reversed(self.running), "")

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
        if line.lstrip().startswith(STARTED):
            self.indent = line[: line.index(STARTED)]
        text = line.removeprefix(self.indent).rstrip()
        if text.startswith(STARTED):
            self.running[text.removeprefix(STARTED)] = time.monotonic()
            self._print(text, style="bold")
        elif text.startswith(DONE) and (name := text.removeprefix(DONE).rpartition(" (")[0]) in self.running:
            self.seconds[name] = time.monotonic() - self.running.pop(name)
            self._print(text, style="green")
        elif self.step and (failed := FAILED.fullmatch(text)):
            self._failed(failed["message"], int(failed["code"]))
        elif TASK_FAILED.search(line):
            self._failed(self.last_line, ExitCode.UNEXPECTED)
        elif self.verbose:
            self._print(line)
        elif self.step and line.startswith(INDENT) and text and not self._for_the_log(text):
            self._print(f"  {text}")
        if line.startswith(INDENT) and text:
            # The last line of a step that dies unexpectedly is the end of its traceback.
            self.last_line = f"{self.step}: {text.strip()}" if self.step else text.strip()

    def _failed(self, failure: str, code: int) -> None:
        """Keep the first failure only: later ones come from the cleanup."""
        if not self.failure:
            self.failure, self.code = failure, code
        if self.running.pop(failure.partition(": ")[0], None) is None:
            self.running.clear()

    def _for_the_log(self, text: str) -> bool:
        """Whether `text` is JSON, a repetition, or part of a traceback, whose last line is not indented."""
        if text.startswith("{") and text.endswith("}"):
            return True
        if ONCE.match(text):
            known, self.said = text in self.said, self.said | {text}
            return known
        if text.startswith("Traceback (most recent call last)"):
            self.in_traceback = True
        elif self.in_traceback and not text.startswith(" "):
            self.in_traceback = False
        else:
            return self.in_traceback
        return True

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
