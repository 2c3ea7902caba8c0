"""Which benchmarks are measured: the suites of lm-evaluation-harness, and the judge of LogicKor. Imports no torch.

A suite is a list of the harness's own names, as of version 0.4.13, with the numbers of few-shot examples under which
these benchmarks are usually reported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from trainer.kinds.base import Count
from trainer.runtimespec import Positive
from trainer.specbase import Spec

Suite = Literal["ko", "en", "code-math"]
Text = Annotated[str, Field(min_length=1)]
NotNegative = Annotated[float, Field(ge=0)]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class TaskSpec(Spec):
    """A task, group or tag of lm-evaluation-harness; also written as its name alone.

    `num_fewshot`: examples before each question; by default as the task says. `limit`: only the first documents of each
    task, for a quick look; by default train.evaluate.limit.
    """

    task: Text
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core)]}


def _tasks(num_fewshot: int | None, *names: str) -> tuple[TaskSpec, ...]:
    return tuple(TaskSpec(task=name, num_fewshot=num_fewshot) for name in names)


SUITES: dict[Suite, tuple[TaskSpec, ...]] = {
    "ko": (*_tasks(5, "kmmlu", "kobest"), *_tasks(0, "haerae")),
    "en": (
        *_tasks(0, "hellaswag", "arc_easy", "piqa", "winogrande", "boolq"),
        *_tasks(25, "arc_challenge"),
        *_tasks(5, "mmlu"),
    ),
    "code-math": (*_tasks(5, "gsm8k"), *_tasks(0, "humaneval")),
}
RUNS_CODE = frozenset({"humaneval"})  # those of the suites whose score is whether the model's program works


class JudgeSpec(Spec):
    """LogicKor: a judge model grades two-turn answers in Korean, from 1 to 10.

    `url`: base address of an OpenAI-compatible API, as https://api.openai.com/v1. `api_key_env`: the environment
    variable with its key; null for a server without one. `questions`: the published questions.jsonl, as a path or an
    address. `prompts`: the published templates.py with the judge's instructions, or a JSON file with single_turn and
    multi_turn; without it we use our own. `max_tokens`: of each answer of our model. `price_…`: money for a million
    tokens of the judge, to count the cost.
    """

    url: Text
    model: Text
    api_key_env: str | None = "JUDGE_API_KEY"
    questions: Text
    prompts: Text | None = None
    max_tokens: Count = 1024
    timeout_seconds: Positive = 120.0
    retries: Annotated[int, Field(ge=0)] = 5
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    price_input: NotNegative | None = None
    price_output: NotNegative | None = None

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", url):
            raise ValueError(
                "must be the address of an API, as https://api.openai.com/v1, without name, password or parameters (?…)"
            )
        return url.rstrip("/")

    @field_validator("questions")
    @classmethod
    def _has_no_password(cls, questions: str) -> str:
        if re.match(r"\w+://[^/]*@", questions):  # it would be in files of the run and in messages
            raise ValueError("must be a path or an address without name and password")
        return questions

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):  # the value may be a key, so it is not repeated
            raise ValueError("must be the name of an environment variable that holds the key, never the key itself")
        return name


class BenchmarksSpec(Spec):
    """The benchmarks in `train.evaluate`; none by default.

    `suites`: ko (KMMLU, HAE-RAE Bench, KoBEST), en, code-math. `tasks`: any others of lm-evaluation-harness, and tasks
    of a suite with other numbers. `task_files`: a folder with own tasks as the harness's YAML files. `limit`: only the
    first documents of each task. `allow_code_execution`: run programs that the model wrote (HumanEval), without a
    sandbox. `judge`: also measure LogicKor.
    """

    suites: list[Suite] = []
    tasks: list[TaskSpec] = []
    task_files: Text | None = None
    limit: Count | None = None
    allow_code_execution: bool = False
    judge: JudgeSpec | None = None

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Self:
        if not self.allow_code_execution and (asked := [t.task for t in self.tasks if t.task in RUNS_CODE]):
            raise ValueError(
                f"tasks: {asked[0]} runs programs that the model wrote, with the rights of this process; set "
                "train.evaluate.allow_code_execution: true where that is acceptable, or leave it out"
            )
        return self

    def beside(self, folder: str) -> Self:
        """The same, with relative paths that start in `folder`."""
        changes: dict[str, Any] = {"task_files": _below(folder, self.task_files)}
        if self.judge:
            paths = {name: _below(folder, getattr(self.judge, name)) for name in ("questions", "prompts")}
            changes["judge"] = self.judge.model_copy(update=paths)
        return self.model_copy(update=changes)

    @property
    def benchmarks(self) -> list[TaskSpec]:
        """The tasks to run, once each, with their limits; those of suites first. Without permission, suites leave out
        what runs code."""
        chosen = {task.task: task for suite in self.suites for task in SUITES[suite]}
        if not self.allow_code_execution:
            chosen = {name: task for name, task in chosen.items() if name not in RUNS_CODE}
        for task in self.tasks:
            usual = chosen.get(task.task, task).num_fewshot
            few = usual if task.num_fewshot is None else task.num_fewshot
            chosen[task.task] = task.model_copy(update={"num_fewshot": few})
        return [task.model_copy(update={"limit": task.limit or self.limit}) for task in chosen.values()]

    @property
    def files(self) -> dict[str, str]:
        """The paths of files and folders that are read, by field."""
        judge = self.judge
        named = {"judge.questions": judge.questions, "judge.prompts": judge.prompts} if judge else {}
        paths = {"task_files": self.task_files, **named}
        return {field: path for field, path in paths.items() if path is not None and "://" not in path}

    @property
    def has_benchmarks(self) -> bool:
        return bool(self.benchmarks) or self.judge is not None

    @property
    def left_out(self) -> list[str]:
        """Tasks of the suites that would run code."""
        if self.allow_code_execution:
            return []
        return [task.task for suite in self.suites for task in SUITES[suite] if task.task in RUNS_CODE]


def _below(folder: str, path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(folder, path))
