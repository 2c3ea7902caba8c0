"""One look at a run: its state, its steps, what each has said, and why the run does not get on or has failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from components.running import CLEANUP
from pipelines.runs.kfp import steplog
from pipelines.runs.kfp.backend import Away, Backend
from pipelines.runs.kfp.obstacle import obstacle
from pipelines.runs.kfp.steppods import StepPods
from pipelines.runs.kfp.workflow import FAILED, Pod, Step, pods, steps

POLL_SECONDS = 5.0
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
NOT_STARTED = "did not start: "
CANCELLED = ("CANCELING", "CANCELED")


class Looker:
    """Looks at one run; remembers the logs of pods that have ended.

    Attributes:
        pods: those of the steps on the cluster, as far as it can be reached; none before the first look.
    """

    def __init__(self, backend: Backend, run_id: str) -> None:
        self.backend, self.run_id = backend, run_id
        self.pods = StepPods("", "")
        self._logs: dict[str, list[str]] = {}
        # Version 2.17 answers with an archived log if its pod has ended, unless the workflow is so large that Argo
        # packs its nodes; with that of a running pod only where users have a namespace each. A web interface at the
        # same address has both. The source that had the last log is asked first.
        self._sources: list[Callable[[Pod], str | None]] = [
            self._archived,
            self._of_pod,
            self._of_cluster,
            self._of_web,
        ]

    def look(self) -> Look:
        run = self.backend.run(self.run_id)
        pipeline, workflow = self.backend.workflow(self.run_id)
        metadata = workflow.get("metadata", {})
        if metadata and not self.pods.workflow:
            self.pods = StepPods(metadata["name"], metadata["namespace"])
        return Look(self, run, workflow, steps(pipeline, workflow, over=run.get("state") in ENDED))

    def until_over(self) -> Iterator[Look]:
        """A look every few seconds, the last one after the run has ended; a backend that restarts is waited for."""
        while True:
            try:
                now = self.look()
            except Away:
                pass
            else:
                yield now
                if now.is_over:
                    return
            time.sleep(POLL_SECONDS)

    def lines(self, pod: Pod) -> list[str] | None:
        """What the step in `pod` has written, whole lines; None if there is no log (yet, or any more)."""
        if pod.phase == "Pending":
            return None
        if pod.node in self._logs:
            return self._logs[pod.node]
        for source in self._sources:
            if (text := source(pod)) is not None:
                self._sources.remove(source)
                self._sources.insert(0, source)
                break
        else:
            return None
        if not pod.is_over:
            return steplog.own(text[: text.rfind("\n") + 1])
        self._logs[pod.node] = steplog.own(text)
        return self._logs[pod.node]

    def _archived(self, pod: Pod) -> str | None:
        return self.backend.log(self.run_id, pod.node) if pod.is_over else None

    def _of_pod(self, pod: Pod) -> str | None:
        return self.backend.log(self.run_id, pod.name)

    def _of_cluster(self, pod: Pod) -> str | None:
        return self.pods.log(pod.name)

    def _of_web(self, pod: Pod) -> str | None:
        return self.backend.log_of_web(self.run_id, pod.name, self.pods.namespace)


@dataclass(frozen=True)
class Look:
    """`run` is the answer of v2beta1, `workflow` Argo's object."""

    looker: Looker
    run: Mapping[str, Any]
    workflow: Mapping[str, Any]
    steps: Sequence[Step]

    @property
    def is_over(self) -> bool:
        return self.run.get("state") in ENDED

    @property
    def was_stopped(self) -> bool:
        """A stopped run ends as failed; only its history tells."""
        history = [each.get("state") for each in self.run.get("state_history", [])]
        return any(state in CANCELLED for state in (self.run.get("state"), *history))

    @property
    def state(self) -> str:
        if self.was_stopped and self.run.get("state") != "SUCCEEDED":
            return "stopped" if self.is_over else "stopping"
        return str(self.run.get("state") or "PENDING").lower()

    @property
    def name(self) -> str:
        return str(self.run.get("display_name") or self.looker.run_id)

    @property
    def failed(self) -> list[Step]:
        """The steps that failed by themselves."""
        return [step for step in self.steps if self.state_of(step) == "failed"]

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)

    def lines(self, step: Step) -> list[str]:
        """What a step has written, of all its pods; without the logs that the backend does not deliver just now."""
        found: list[str] = []
        for pod in step.pods:
            with suppress(Away):
                found += self.looker.lines(pod) or []
        return found

    def state_of(self, step: Step) -> str:
        """As `step.state`; stopped instead of failed if it ended because the run was stopped."""
        if step.state == "failed" and self.was_stopped and not steplog.has_failed(self.lines(step)):
            return "stopped"
        return step.state

    def said(self, step: Step) -> str:
        """What there is to say about a step: why it fails or does not start, else its last line."""
        state, lines = self.state_of(step), self.lines(step)
        if state in ("failed", "stopped") and step.pods and not lines:
            hindered = obstacle(self.looker.pods.hindrance(step.pods[-1].name))
            if hindered:
                return f"{NOT_STARTED}{hindered}"
        if state == "failed":
            if not step.pods and step.driver:
                lines = self.looker.lines(step.driver) or []
            return f"error: {steplog.failure(lines, step.message)}"
        if state == "starting":
            hindered = obstacle(step.message)
            return str(hindered) if hindered else ""
        return steplog.last(lines)

    def why(self) -> str:
        """Why the run failed or does not get on; "" if it does."""
        if self.is_over:
            told = [f"{step.name}: {self.said(step)}" for step in self.failed]
            # Cleaning up fails after another step for the same reason, as without rights.
            others = [each for each in told if not each.startswith(f"{CLEANUP}: ")]
            told = others or told
            if self.state == "stopped":
                waited = [(step.name, self.said(step)) for step in self.steps if self.state_of(step) == "stopped"]
                told += [f"{name}: {said}" for name, said in waited if said.startswith(NOT_STARTED)][:1]
            if not told and self.state == "failed":
                told = [self._failed_outside()]
            return "; ".join(told)
        waits = [f"{step.name} {said}" for step in self.steps if step.state == "starting" and (said := self.said(step))]
        if not waits:
            hindered = [obstacle(pod.message) for pod in pods(self.workflow) if pod.phase == "Pending"]
            waits = [f"a pod of the backend {found}" for found in hindered if found]
        return "; ".join(waits)

    def _failed_outside(self) -> str:
        """Why a run failed in which no step did: in the backend's own pods."""
        for pod in pods(self.workflow):
            if pod.phase in FAILED:
                return steplog.failure(self.looker.lines(pod) or [], pod.message)
        error = self.run.get("error") or {}
        return error.get("message") or self.workflow.get("status", {}).get("message") or "the backend says no reason"
