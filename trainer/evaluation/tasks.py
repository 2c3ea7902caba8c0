"""The tasks that lm-evaluation-harness knows, and which of them cannot be run. Imports no torch."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.benchmarkspec import BenchmarksSpec
from trainer.errors import SpecError

PACKAGE = "lm_eval"


def refuse_unknown(spec: BenchmarksSpec) -> None:
    """Refuse, before anything is loaded, what cannot be run.

    Raises:
        SpecError: the package is missing, a name is unknown, task_files is not a folder, or a task runs code without
            permission.
    """
    if not spec.benchmarks:
        return
    if find_spec(PACKAGE) is None:
        raise SpecError(
            "train.evaluate: benchmarks need lm-evaluation-harness, which is not installed; install it with "
            "pip install 'yaongi[eval]', or remove suites and tasks"
        )
    if spec.task_files is not None and not Path(spec.task_files).is_dir():
        raise SpecError(
            f"train.evaluate.task_files: {spec.task_files} is not a folder; name the folder of the YAML files"
        )
    if not spec.tasks and not spec.task_files:
        return  # the names of the suites are known
    index = manager(spec.task_files).task_index
    for task in spec.benchmarks:
        if task.task not in index:
            near = difflib.get_close_matches(task.task, index, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`lm_eval ls tasks` lists them"
            raise SpecError(f"train.evaluate.tasks: lm-evaluation-harness has no task '{task.task}'; {hint}")
        if not spec.allow_code_execution and (unsafe := runs_code(task.task, index)):
            raise SpecError(
                f"train.evaluate.tasks: {unsafe} runs programs that the model wrote, with the rights of this process; "
                "set train.evaluate.allow_code_execution: true where that is acceptable, or leave it out"
            )


@cache
def manager(task_files: str | None) -> Any:
    """The harness's index of tasks; reading its 15,000 files takes seconds."""
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=task_files)


def runs_code(name: str, index: dict[str, Any]) -> str | None:
    """The task with that name, or in the group or tag of that name, that runs programs of the model."""
    entry = index.get(name)
    if entry is None:
        return None
    if (entry.cfg or {}).get("unsafe_code"):
        return name
    inside = (entry.cfg or {}).get("task")
    members = list(entry.tags) if entry.cfg is None else inside if isinstance(inside, list) else []
    named = (member.get("task") if isinstance(member, dict) else member for member in members)
    return next((found for one in named if isinstance(one, str) and (found := runs_code(one, index))), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks and progress bars of the harness and of the libraries that fetch its data."""
    if os.environ.get("YAONGI_VERBOSE"):
        yield
        return
    from tqdm.std import tqdm

    show = tqdm.__init__
    tqdm.__init__ = lambda self, *given, **options: show(self, *given, **{**options, "disable": True})
    names = ("lm_eval", "huggingface_hub", "datasets", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tqdm.__init__ = show
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
