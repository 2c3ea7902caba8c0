"""The benchmark scores in eval.json as rows, for everything that shows them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

LOGICKOR = "logickor"


class Row(NamedTuple):
    """One number; `stderr` is None where there is none, `num_fewshot` and `version` for LogicKor."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_fewshot: int | None
    samples: int
    version: str | None

    @property
    def name(self) -> str:
        """A name for systems that know only numbers with names."""
        return re.sub(r"\W+", "_", f"benchmark_{self.task}_{self.metric}").strip("_")

    @property
    def text(self) -> str:
        """The number with its standard error."""
        return shown(self.value, self.stderr)


def shown(value: float, stderr: float | None) -> str:
    """A number with its standard error, three decimals each."""
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def rows(evaluation: dict[str, Any]) -> list[Row]:
    """All scores of an eval.json, without those of the tasks inside groups."""
    found: list[Row] = []
    for task, scores in evaluation.get("benchmarks", {}).items():
        found += of_task(task, scores)
    if judged := evaluation.get(LOGICKOR):
        found += of_task(LOGICKOR, judged)
    return found


def inner_rows(evaluation: dict[str, Any]) -> list[Row]:
    """The scores of the tasks inside groups, as "group/task"."""
    groups = evaluation.get("benchmarks", {}).items()
    inside = [
        (f"{group}/{task}", scores) for group, all_ in groups for task, scores in all_.get("subtasks", {}).items()
    ]
    return [row for name, scores in inside for row in of_task(name, scores)]


def judged_by(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Who graded LogicKor, what questions by which instructions, and the answers without a score; empty without it."""
    found = evaluation.get(LOGICKOR, {})
    return {name: found[name] for name in ("judge", "questions", "instructions", "unscored") if name in found}


def limited(evaluation: dict[str, Any]) -> bool:
    """Whether only the first documents of some task were used (`limit`)."""
    settings = evaluation.get("settings", {})
    return any(each.get("limit") for each in (settings, *settings.get("tasks", [])))


def of_task(task: str, scores: dict[str, Any]) -> Iterator[Row]:
    """The rows of one task's scores."""
    few, version = scores.get("num_fewshot"), scores.get("version")
    for metric, number in scores["metrics"].items():
        said = None if version is None else str(version)
        yield Row(task, metric, number["value"], number["stderr"], few, scores["samples"], said)
