"""The data and the layout of `yaongi status`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.runs.standing import Standing
from trainer.recording.results import loss_of

OVER = {"finished", "succeeded", "failed", "stopped", "killed", "gone", "idle", "canceled", "skipped", "unreadable"}
COLOURS = {
    "running": "green",
    "finished": "green",
    "succeeded": "green",
    "failed": "red",
    "killed": "red",
    "unreadable": "red",
}


@dataclass(frozen=True)
class View:
    """One run. `why` adds to the state: what it waits for, how it failed, what to do."""

    name: str
    where: str
    state: str
    why: str = ""
    standing: Standing = field(default_factory=Standing)
    rows: Sequence[tuple[str, str]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def table(views: Sequence[View]) -> Table:
    shown = Table(box=None, header_style="bold")
    for title in ("run", "where", "state", "step", "loss", "tokens/s", "left", "checkpoint", "restarts"):
        shown.add_column(title, no_wrap=True)
    for view in views:
        numbers = view.standing
        shown.add_row(
            view.name,
            view.where,
            _state_text(view),
            numbers.progress,
            _number(numbers.loss, "{:.3f}"),
            _number(numbers.tokens_per_second, "{:,.0f}"),
            "" if view.is_over or numbers.left is None else str(numbers.left),
            numbers.checkpoint,
            str(numbers.restarts),
        )
    return shown


def details(view: View) -> RenderableType:
    """Everything about one run, one item per line; never wrapped, so that it can be copied."""
    numbers = view.standing
    rows = [
        ("where", view.where),
        ("step", numbers.progress),
        ("loss", _number(numbers.loss, f"{{:.4f}} ({loss_of(numbers.loss_steps)})")),
        ("speed", _number(numbers.tokens_per_second, "{:,.0f} tokens/s")),
        ("left", "" if view.is_over or numbers.left is None else str(numbers.left)),
        ("checkpoint", numbers.checkpoint),
        ("restarts", str(numbers.restarts)),
        *(("advice", line) for line in numbers.advice),
        *view.rows,
    ]
    state = Text.assemble((f"{'state':<12}", "bold"), _state_text(view), f": {view.why}" if view.why else "")
    lines = [Text.assemble((f"{label:<11} ", "bold"), value) for label, value in rows if value]
    return Group(Text(view.name, style="bold"), state, *lines)


def _state_text(view: View) -> Text:
    return Text(view.state, style=COLOURS.get(view.state, "yellow"))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
