"""What `yaongi status` shows of a run, wherever it is, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from components.marks import DONE, MOVED, STARTED
from pipelines import background, options
from pipelines.background import Process
from pipelines.runs.local import Run
from pipelines.runs.standing import Standing, of_directory
from trainer.exitcodes import STOPS
from trainer.recording.results import loss_of, read_json
from trainer.thismachine import PORTS_FILE

OVER = {"finished", "succeeded", "failed", "stopped", "killed", "gone", "idle", "canceled", "skipped"}
COLOURS = {"running": "green", "finished": "green", "succeeded": "green", "failed": "red", "killed": "red"}


@dataclass(frozen=True)
class View:
    """One run. `why` says what the state does not: what it waits for, how it failed, what to do."""

    name: str
    where: str
    state: str
    why: str = ""
    standing: Standing = field(default_factory=Standing)
    rows: Sequence[tuple[str, str]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def of_local(run: Run) -> View:
    alive = background.is_alive(run.workdir, run.name)  # first, else one that ends meanwhile would look killed
    process, log = background.read(run.workdir, run.name), newest_log(run)
    state, why = _running(process, log) if alive else _ended(run, process)
    directory = run.directory
    rows = [("directory", str(directory))]
    if process:
        rows.append(("process", f"{process.pid} on {process.host}, started in {process.cwd}"))
    if log:
        rows.append(("log", str(log)))
    if alive and (served := _ports(directory, log, process)):
        rows.append(("metrics", served))
    return View(run.name, "here", state, why, of_directory(directory), rows)


def _ports(directory: Path, log: Path | None, process: Process | None) -> str:
    """Where a living run can be scraped: its ranks, once they train, and its steps where their port is another."""
    served, file = [], directory / PORTS_FILE
    if file.is_file() and (process is None or file.stat().st_mtime >= process.started):
        ports = (read_json(file) or {}).get("ports", [])
        served += [f"rank {rank}: port {port}" for rank, port in enumerate(ports) if port]
    moved = [line.strip().removeprefix(MOVED) for line in _lines(log, process) if line.strip().startswith(MOVED)]
    return ", ".join([*served, *(f"steps: port {each}" for each in moved[-1:])])


def newest_log(run: Run) -> Path | None:
    """The full log of the pipeline's last start."""
    logs = (run.workdir / "logs").glob(f"{run.name}-*.log")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


def _running(process: Process | None, log: Path | None) -> tuple[str, str]:
    step = present_step(process, log)
    return "running", f"in step {step}" if step else "starting"


def _ended(run: Run, process: Process | None) -> tuple[str, str]:
    again = f"continue: yaongi resume {run.name}{options.again(run.workdir)}"
    if process is None:
        result = read_json(run.directory / "result.json")
        done = result is not None and (run.directory / "export" / "manifest.json").is_file()
        return ("finished", "") if done else ("idle", f"nobody drives it from {run.workdir}; {again}")
    if process.ended is None:
        return (
            "killed",
            f"its process {process.pid} went without a word, as after kill -9 or for want of memory; {again}",
        )
    if process.code == 0:
        return "finished", ""
    if process.code in STOPS:
        return "stopped", again
    return "failed", process.error


def present_step(process: Process | None, log: Path | None) -> str:
    """The pipeline's step that started last and has not ended."""
    running: list[str] = []
    for line in _lines(log, process):
        text = line.strip()
        if text.startswith(STARTED):
            running.append(text.removeprefix(STARTED))
        elif text.startswith(DONE) and (name := text.removeprefix(DONE).rpartition(" (")[0]) in running:
            running.remove(name)
    return running[-1] if running else ""


def _lines(log: Path | None, process: Process | None) -> list[str]:
    """Of the log of the present start; none where there is only that of an earlier one."""
    if log is None or (process and log.stat().st_mtime < process.started):
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


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
    """Everything about one run, a line each; never wrapped, so that it can be copied."""
    numbers = view.standing
    rows = [
        ("where", view.where),
        ("step", numbers.progress),
        ("loss", _number(numbers.loss, f"{{:.4f}} ({loss_of(numbers.loss_steps)})")),
        ("speed", _number(numbers.tokens_per_second, "{:,.0f} tokens/s")),
        ("left", "" if view.is_over or numbers.left is None else str(numbers.left)),
        ("checkpoint", numbers.checkpoint),
        ("restarts", str(numbers.restarts)),
        *view.rows,
    ]
    state = Text.assemble((f"{'state':<12}", "bold"), _state_text(view), f": {view.why}" if view.why else "")
    lines = [Text.assemble((f"{label:<12}", "bold"), value) for label, value in rows if value]
    return Group(Text(view.name, style="bold"), state, *lines)


def _state_text(view: View) -> Text:
    return Text(view.state, style=COLOURS.get(view.state, "yellow"))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
