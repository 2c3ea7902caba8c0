"""Runs tasks of lm-evaluation-harness one after another, and keeps the result of each as soon as it is known.

The results lie in run_dir/benchmarks.json; each has a key of everything that it depends on, so an evaluation that was
stopped, or asks for more tasks, computes only what is missing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.benchmarkspec import BenchmarksSpec, TaskSpec
from trainer.errors import DataError, ForeseenError, LaunchError, in_words
from trainer.evaluation.tasks import PACKAGE, cached_after, dataset_of, files_digest, manager, quiet
from trainer.files import atomic_write
from trainer.recording.results import read_json
from trainer.specbase import canonical_digest

if TYPE_CHECKING:
    from trainer.evaluation.lm import HarnessModel

log = logging.getLogger(__name__)

FILE = "benchmarks.json"
OTHER_SEED, SEED = 0, 1234
Scores = dict[str, Any]


def run(
    spec: BenchmarksSpec, lm: HarnessModel, run_dir: str, known: dict[str, Any], told: Callable[[str, Scores], None]
) -> dict[str, Scores]:
    """The scores of all tasks, by name; those of a group also have its `subtasks`.

    Args:
        known: what the scores depend on besides the spec: the checkpoint, and how it is computed.
        told: called with each task's scores as soon as they are there.

    Raises:
        LaunchError: some tasks could not be read; the scores of the others are kept.
        DataError: a task's own definition is wrong, or does not suit the model; as before.
    """
    path, found, failed = Path(run_dir) / FILE, dict[str, Scores](), dict[str, ForeseenError]()
    stored = (read_json(path) or {}).get("tasks", {})
    for name in spec.left_out:
        log.info("%s is left out, as it runs programs that the model wrote (train.evaluate.allow_code_execution)", name)
    files = files_digest(spec.task_files)
    for task in spec.benchmarks:
        key = canonical_digest([known, version(PACKAGE), task.model_dump(mode="json"), files])
        if stored.get(task.task, {}).get("key") == key:
            scores = stored[task.task]["scores"]
            log.info("%s: measured before", task.task)
        else:
            began = time.monotonic()
            log.info("%s …", task.task)
            try:
                with cached_after(list(failed.values())):
                    scores = _measured(spec, task, lm)
            except ForeseenError as error:
                failed[task.task] = error
                log.warning("%s: %s", task.task, error)
                continue
            seconds = round(time.monotonic() - began, 3)
            stored[task.task] = {"key": key, "seconds": seconds, "scores": scores}
            atomic_write(path, (json.dumps({"tasks": stored}, indent=1, ensure_ascii=False) + "\n").encode())
        found |= scores
        for name, one in scores.items():
            told(name, one)
    if failed:
        name, first = next(iter(failed.items()))
        others = [other for other in failed if other != name]
        more = f" (also failed: {', '.join(others)})" if others else ""
        kept = f"; what was measured is kept in {path}" if found else ""
        raise type(first)(f"benchmark {name}: {first}{more}{kept}")
    return found


def _measured(spec: BenchmarksSpec, task: TaskSpec, lm: HarnessModel) -> dict[str, Scores]:
    """The scores of one task; for a tag, and a group without scores of its own, those of its tasks."""
    from lm_eval.evaluator import evaluate

    with quiet(), _allowing_code(spec.allow_code_execution):
        index = manager(spec.task_files)
        random.seed(OTHER_SEED)  # for tasks that shuffle; the seeds are the harness's own
        np.random.seed(SEED)
        try:
            loaded = index.load([task.task])
        except Exception as error:  # the definition of a task is a program of its author
            raise _unloadable(error, dataset_of(task.task, index.task_index)) from error
        for one in loaded["tasks"].values():
            usual = one.get_config("num_fewshot")
            if usual is None or (usual and task.num_fewshot is not None):  # 0 means that examples make no sense there
                one.set_config(key="num_fewshot", value=task.num_fewshot or 0)
            one.set_fewshot_seed(seed=SEED)
        try:
            result = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=task.limit,
                log_samples=False,
                apply_chat_template=lm.chats,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=spec.allow_code_execution,
            )
        except ForeseenError:
            raise
        except Exception as error:
            if _is_ours(error):
                raise
            raise DataError(f"its definition does not work ({type(error).__name__}: {in_words(error)})") from error
    assert result is not None
    groups = loaded.get("groups", {})
    if task.task in groups and (whole := _scores(task.task, result))["metrics"]:
        inside = [name for name in (*groups, *loaded["tasks"]) if name != task.task]
        return {task.task: whole | {"subtasks": {name: _scores(name, result) for name in inside}}}
    return {name: _scores(name, result) for name in loaded["tasks"]}


def _scores(name: str, result: Any) -> Scores:
    """The metrics of a task or group with their standard errors, where the harness has one."""
    metrics, better = dict[str, dict[str, float | bool | None]](), result["higher_is_better"].get(name) or {}
    for key, value in result["results"].get(name, {}).items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = result["results"][name].get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if _is_number(error) else None,
            "higher_is_better": better.get(metric),
        }
    samples = result["n-samples"].get(name, {}).get("effective") or result["results"].get(name, {}).get("sample_len")
    if samples is None:
        leaves = result["n-samples"].values()
        samples = sum(leaf["effective"] for leaf in leaves)
    return {
        "metrics": metrics,
        "version": result["versions"].get(name),
        "num_fewshot": result["n-shot"].get(name),
        "samples": samples,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unloadable(error: Exception, dataset: str | None) -> ForeseenError:
    """The error for a task that cannot be loaded: mostly its data cannot be read."""
    said = in_words(error)
    if isinstance(error, ConnectionError | FileNotFoundError | TimeoutError):
        return LaunchError(
            f"its {f'dataset {dataset}' if dataset else 'data'} cannot be read ({said}); connect this machine to "
            "huggingface.co, or copy a Hugging Face cache that has it here and set HF_HOME to it and HF_HUB_OFFLINE=1"
        )
    return DataError(f"its definition cannot be loaded ({type(error).__name__}: {said})")


def _is_ours(error: Exception) -> bool:
    """Whether it was raised in our model, so that the task is not to blame."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "trainer.evaluation.lm" for frame, _ in frames)


@contextmanager
def _allowing_code(allowed: bool) -> Iterator[None]:
    """The library that runs the programs asks for this variable."""
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.pop(name, None)
    if allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
