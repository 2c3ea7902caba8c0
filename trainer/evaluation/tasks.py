"""The tasks that lm-evaluation-harness knows, and which of them cannot be run. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from trainer.benchmarkspec import BenchmarksSpec
from trainer.errors import SpecError
from trainer.files import checksum

PACKAGE = "lm_eval"
TASK_FILES = "task_files_sha256"  # in eval.json


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
            if spec.task_files and (broken := _broken(spec.task_files)):
                raise SpecError(f"train.evaluate.task_files: {broken}")
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


def _broken(folder: str) -> str:
    """The first of a folder's YAML files that cannot be read, which the harness leaves out, and why; "" if all can."""
    for file in sorted(Path(folder).rglob("*.yaml")):
        try:
            for _ in yaml.parse(file.read_bytes()):
                pass
        except yaml.YAMLError as error:
            return f"{file}: not valid YAML ({' '.join(str(error).split())})"
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
    return ""


def files_digest(folder: str | None) -> str | None:
    """Of all own tasks and of the files beside them, such as their data."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.suffix != ".pyc"):
        digest.update(f"{checksum(file, 'sha256')} {file.relative_to(folder)}\n".encode())
    return digest.hexdigest()


def runs_code(name: str, index: dict[str, Any]) -> str | None:
    """The task with that name, or in the group or tag of that name, that runs programs of the model."""
    return next((task for task, cfg in _inside(name, index) if cfg.get("unsafe_code")), None)


def dataset_of(name: str, index: dict[str, Any]) -> str | None:
    """The dataset on the Hub that a task reads, or the first one of a group or tag; None for local files."""
    found = (cfg.get("dataset_path") for _, cfg in _inside(name, index))
    return next((path for path in found if isinstance(path, str) and "/" in path), None)


def _inside(name: str, index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks of that name, and what their files say."""
    if (entry := index.get(name)) is None:
        return
    members = entry.cfg.get("task") if entry.cfg else sorted(entry.tags)
    if not isinstance(members, list):
        yield name, entry.cfg or {}
        return
    for member in members:
        inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
        if isinstance(inner, str):
            yield from _inside(inner, index)


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


@contextmanager
def cached_after(failed: Sequence[BaseException]) -> Iterator[None]:
    """Read from the cache of datasets only, if one of these errors says that the Hub cannot be reached: its client has
    tried for half a minute, and would for every other dataset."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if any(isinstance(error.__cause__, ConnectionError) for error in failed):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
