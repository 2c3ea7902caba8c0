"""A run on Kubeflow Pipelines, by its id: follow, show, print logs, stop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from components.marks import STARTED
from pipelines.runs.kfp import look as looking
from pipelines.runs.kfp.backend import Away, Backend, connect
from pipelines.runs.kfp.look import Look, Looker
from pipelines.runs.kfp.stopping import stop
from pipelines.runs.kfp.watched import Watched
from pipelines.runs.kfp.workflow import Step
from pipelines.runs.standing import Standing, of_lines
from pipelines.runs.view import View
from trainer.errors import LaunchError

AGAIN = "submit its job again to continue"
ENDED_OR_RUNS = ("running", "succeeded", "failed")


def url(host: str, run_id: str) -> str:
    """The run's page in the web interface."""
    return f"{host.rstrip('/')}/#/runs/details/{run_id}"


def follow_run(backend: Backend, run_id: str, console: Console) -> None:
    """Print each step's state and last line as they change, until the run has ended.

    Raises:
        LaunchError: it did not succeed.
    """
    shown: dict[str, tuple[str, str]] = {}
    for now in Looker(backend, run_id).until_over():
        for step in now.steps:
            state, said = now.state_of(step), now.said(step)
            before = shown.get(step.name, ("", ""))
            # A step that starts without trouble is not worth a line.
            if not step.has_begun or (state, said) == before or (state == "starting" and not said):
                continue
            shown[step.name] = state, said
            if state == before[0]:
                text = said
            else:
                text = state + (f" in {step.seconds}" if state in ("succeeded", "failed", "stopped") else "")
                text += f": {said}" if said else ""
            console.print(f"{step.name}: {text}", highlight=False, markup=False, soft_wrap=True)
    if now.state == "stopped":
        raise LaunchError(f"the run was stopped; {AGAIN}")
    if now.state != "succeeded":
        raise LaunchError(f"the run ended as {now.state}: {now.why()}; the whole log: yaongi logs {run_id}")


@dataclass(frozen=True)
class KfpRun:
    """Each operation raises as `connect`; LaunchError for an unknown run."""

    name: str
    host: str

    def view(self) -> View:
        now = self._looker.look()
        why = "; ".join(each for each in (now.why(), AGAIN if now.state == "stopped" else "") if each)
        rows = [(step.name, _row(now, step, why)) for step in now.steps]
        rows = [("run", self.name), *rows, ("page", url(self.host, self.name))]
        return View(now.name, self.host, now.state, why, _standing(now), rows)

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        """Print what the steps have written so far, one step after another."""
        if rank:
            raise LaunchError(
                f"--rank {rank}: Kubeflow Pipelines has the log of rank 0 only; for the others, while they run: "
                f"yaongi logs NAME -n NAMESPACE --rank {rank}, by the run's own name"
            )
        task = "train" if rank == 0 else task
        printed: dict[str, int] = {}
        while True:
            try:
                now = self._looker.look()
                steps = _wanted(now, task)
                for step in steps:
                    _print_new(now, step, printed)
            except Away:
                if not (follow and printed):
                    raise
            else:
                if now.is_over or not follow or (task and steps[0].state in ("succeeded", "failed", "skipped")):
                    break
            time.sleep(looking.POLL_SECONDS)
        if task and task not in printed:
            raise LaunchError(_no_log(now, steps[0]))
        missing = [
            step.name for step in steps if step.state in ENDED_OR_RUNS and step.pods and step.name not in printed
        ]
        if missing:
            console.print(_not_served(now, missing), style="dim", highlight=False, soft_wrap=True)

    def stop(self, write: Callable[[str], None]) -> str:
        """Terminate the run, and wait until nothing of it runs. Termination kills the steps without a signal; the
        pipeline's exit handler then deletes the training job, whose workers save a checkpoint."""
        return f"{stop(self._looker, write)}; {AGAIN}"

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        now = self._looker.look()
        raise LaunchError(f"run {self.name} is {now.state}; Kubeflow Pipelines cannot restart a run: {AGAIN}")

    def why(self) -> str:
        now = self.view()
        return f"{now.name}, on {now.where}, is {now.state}" + (f": {now.why}" if now.why else "")

    @functools.cached_property
    def _looker(self) -> Looker:
        return Looker(connect(self.host), self.name)


def _no_log(now: Look, step: Step) -> str:
    said = now.said(step)
    if step.state not in ENDED_OR_RUNS or said:
        return f"step {step.name} has no log: it is {now.state_of(step)}" + (f": {said}" if said else "")
    return _not_served(now, [step.name])


def _not_served(now: Look, steps: Sequence[str]) -> str:
    return (
        f"{now.looker.backend.host} does not serve the log of {', '.join(steps)}; set KUBECONFIG to its cluster, or "
        "give the address of its web interface as --host"
    )


def _wanted(now: Look, task: str) -> list[Step]:
    found = [step for step in now.steps if task in ("", step.name)]
    if not found and now.steps:
        known = ", ".join(step.name for step in now.steps)
        raise LaunchError(f"run {now.looker.run_id} has no step '{task}'; it has: {known}")
    return found


def _row(now: Look, step: Step, why: str) -> str:
    """State, time and last line, unless `why` has it."""
    seconds, said = step.seconds, now.said(step)
    told = "" if said in why else said
    return f"{now.state_of(step):<10} {'' if seconds is None else seconds!s:<8} {told}".rstrip()


def _standing(now: Look) -> Standing:
    """The numbers of the training, from the log of its step. That ends when a run is stopped; its workers write on,
    and name the checkpoint that they save then."""
    step = now.step("train")
    lines = now.lines(step) if step else []
    if now.state == "stopped" and lines:
        training = Watched(now, lambda line: None)
        training.workers()
        lines = [*lines, *training.log()]
    return of_lines(lines)


def _print_new(now: Look, step: Step, printed: dict[str, int]) -> None:
    """Print the lines that the pods of a step have written since the last call.

    Args:
        printed: number of lines by pod, and 0 by the name of each step with a log.
    """
    for pod in step.pods:
        lines = now.looker.lines(pod)
        if lines is None:
            continue
        if pod.node not in printed and not any(line.startswith(STARTED) for line in lines[:1]):
            print(f"{STARTED}{step.name} ({now.state_of(step)})", flush=True)
        for line in lines[printed.get(pod.node, 0) :]:
            print(line, flush=True)
        printed[pod.node] = len(lines)
        printed[step.name] = 0
