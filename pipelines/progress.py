"""What a person sees of a pipeline that runs here: each step's name, its own lines, its time; nothing of KFP's log.

The steps announce themselves (`components.running`); whatever is printed outside a step is the machinery's and goes to
the log file only.
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

# What kfp.local says of a step that has died, also of one that could not say so itself.
TASK_FAILED = re.compile(r"Task \S+ finished with status \S*FAILURE")
ONCE = re.compile(r"operation |metrics ")  # what each step or task says for itself, mostly word by word the same
INDENT = " " * 4  # kfp.local puts it before every line of a step, several times where steps lie in one another


class Watcher:
    """Follows the output of `pipelines.execute`; then `failure` says which step failed and why ("" if none
    said), `code` with which exit code."""

    def __init__(self, console: Console, log: TextIO, *, verbose: bool = False) -> None:
        self.console, self.log, self.verbose = console, log, verbose
        self.running: dict[str, float] = {}  # steps and when they started; several where a loop runs them side by side
        self.indent = INDENT
        self.failure = ""
        self.code: int = ExitCode.UNEXPECTED
        self.last_line = ""
        self.in_traceback = False
        self.said: set[str] = set()
        self.seconds: dict[str, float] = {}

    @property
    def step(self) -> str:
        """The step that started last of those that run, else ""."""
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
            # What a step that dies of something unforeseen said last, which is the end of its traceback.
            self.last_line = f"{self.step}: {text.strip()}" if self.step else text.strip()

    def _failed(self, failure: str, code: int) -> None:
        """The first one counts: what comes after it is the cleaning up."""
        if not self.failure:
            self.failure, self.code = failure, code
        if self.running.pop(failure.partition(": ")[0], None) is None:
            self.running.clear()

    def _for_the_log(self, text: str) -> bool:
        """Whether `text` is JSON, was said before, or belongs to a traceback; the last line of one is not indented."""
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
