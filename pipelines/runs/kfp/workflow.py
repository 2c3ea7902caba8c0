"""The steps of a run: a workflow has some 45 nodes for a dozen of them.

Kubeflow Pipelines 2.17 makes of each task a driver pod and an executor pod, with a node for every level above them and
one more for every level that may be retried. A node's `name` is its path: `RUN(0).root(0).exit-handler-1(0).launch(0)
.executor(0)` is the first attempt of the executor of the task `launch`. Numbers in brackets are attempts, or
attempts of a loop's item. Users know the tasks by the names that the pipeline gives them (`taskInfo.name`): `launch`,
`launch-2`, `launch-3` of one component are train, evaluate, export.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

Node = Mapping[str, Any]
ATTEMPTS = re.compile(r"(\(\d+(:[^)]*)?\))+$")
EXECUTOR, DRIVER = "executor", "-driver"
FAILED = ("Failed", "Error")
DONE = ("Succeeded", "Skipped", "Omitted", *FAILED)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True)
class Pod:
    """A pod of a run: `node` is its node's id, `name` the name that Argo gives it, `message` why it waits or failed."""

    node: str
    name: str
    phase: str
    message: str
    began: datetime | None
    ended: datetime | None

    @property
    def is_over(self) -> bool:
        return self.phase in DONE


@dataclass(frozen=True)
class Step:
    """A task of the pipeline, under the name that users know.

    Attributes:
        state: waiting, starting, running, succeeded, failed, skipped (the backend took it from its cache, or its
            condition was not met) or not run.
        pods: of its executors, the oldest first: several for a loop, or for repeated attempts.
        message: why it is still starting, or why it failed as far as the workflow says; "" for neither.
    """

    name: str
    state: str
    pods: Sequence[Pod] = ()
    message: str = ""
    driver: Pod | None = None

    @property
    def seconds(self) -> timedelta | None:
        """The time of its pods from the first to the last, or until now; None before it has begun."""
        starts = [pod.began for pod in self.pods if pod.began]
        if not starts:
            return None
        ends = [pod.ended for pod in self.pods]
        end = max((stamp for stamp in ends if stamp), default=None) if all(ends) else datetime.now(UTC)
        return timedelta(seconds=round(max(0.0, (end - min(starts)).total_seconds()))) if end else None

    @property
    def has_begun(self) -> bool:
        return self.state not in ("waiting", "not run")


def steps(pipeline: str, workflow: Mapping[str, Any], *, over: bool) -> list[Step]:
    """The pipeline's steps in the order in which they run.

    Args:
        pipeline: YAML of the compiled pipeline.
        workflow: Argo's workflow object; {} before it exists.
        over: whether the run has ended.
    """
    nodes = list(workflow.get("status", {}).get("nodes", {}).values())
    name = workflow.get("metadata", {}).get("name", "")
    return [_step(task, nodes, name, over) for task in tasks(pipeline)]


def pods(workflow: Mapping[str, Any]) -> list[Pod]:
    """All pods of a run, also those of drivers."""
    nodes = workflow.get("status", {}).get("nodes", {}).values()
    return [_pod(node, workflow["metadata"]["name"]) for node in nodes if node["type"] == "Pod"]


@dataclass(frozen=True)
class Task:
    """A task that runs a container; `name`: the one that users know; `groups`: the groups, loops and conditions that
    it is in."""

    key: str
    name: str
    groups: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def tasks(pipeline: str) -> tuple[Task, ...]:
    """The tasks that run a container, each after those that it waits for."""
    spec = next(iter(yaml.load_all(pipeline, LOADER)), None) or {}
    return tuple(_tasks(spec, spec.get("root", {})))


def _tasks(spec: Mapping[str, Any], component: Mapping[str, Any], groups: tuple[str, ...] = ()) -> Iterator[Task]:
    found = component.get("dag", {}).get("tasks", {})
    done: list[str] = []

    def visit(task: str) -> None:
        for before in found[task].get("dependentTasks", []):
            if before not in done:
                visit(before)
        if task not in done:
            done.append(task)

    for task in found:
        visit(task)
    for task in done:
        inner = spec["components"][found[task]["componentRef"]["name"]]
        if "dag" in inner:
            yield from _tasks(spec, inner, (*groups, task))
        else:
            yield Task(task, found[task].get("taskInfo", {}).get("name") or task, groups)


def _step(task: Task, nodes: Sequence[Node], workflow: str, over: bool) -> Step:
    paths = [(node, [ATTEMPTS.sub("", part) for part in node["name"].split(".")]) for node in nodes]
    own = [node["phase"] for node, path in paths if path[-1] == task.key]
    mine = [node for node, path in paths if path[-2:] == [task.key, EXECUTOR] and node["type"] == "Pod"]
    drivers = [node for node, path in paths if path[-1] == task.key + DRIVER and node["type"] == "Pod"]
    around = [[node["phase"] for node, path in paths if path[-1] == group] for group in task.groups]
    over = over or any(phases and all(phase in DONE for phase in phases) for phases in around)
    found = sorted((_pod(node, workflow) for node in mine), key=lambda pod: pod.began or datetime.now(UTC))
    driver = _pod(drivers[-1], workflow) if drivers else None
    state = _state(own, found, driver, over)
    message = ""
    if state in ("starting", "failed"):
        told = [pod for pod in (*found, *([driver] if driver and not found else [])) if pod.message]
        wanted = [pod for pod in told if (pod.phase in FAILED) == (state == "failed")]
        message = wanted[-1].message if wanted else ""
    return Step(task.name, state, found, message, driver)


def _state(own: Sequence[str], found: Sequence[Pod], driver: Pod | None, over: bool) -> str:
    undone = driver is not None and driver.phase in FAILED and not found  # then the backend omits the task
    if any(phase in FAILED for phase in own) or undone:
        return "failed"
    if any(pod.phase == "Running" for pod in found):
        return "running"
    if any(phase not in DONE for phase in own):
        return "not run" if over else "starting"
    if not own:
        return "not run" if over else "starting" if driver else "waiting"
    if "Succeeded" in own:
        return "succeeded" if found else "skipped"
    return "skipped" if "Skipped" in own else "not run"


def _pod(node: Node, workflow: str) -> Pod:
    number = node["id"].rpartition("-")[2]
    name = f"{workflow}-{node['templateName']}-{number}" if node.get("templateName") else node["id"]
    began, ended = _time(node.get("startedAt")), _time(node.get("finishedAt"))
    return Pod(node["id"], name, node["phase"], node.get("message") or "", began, ended)


def _time(stamp: str | None) -> datetime | None:
    return datetime.fromisoformat(stamp) if stamp else None
