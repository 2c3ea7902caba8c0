"""Runs on Kubeflow Pipelines: connect, follow, show, print logs, stop.

Everything uses the v2beta1 API of the kfp client except logs, which the web interface serves at the same address.
"""

from __future__ import annotations

import re
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from components.quick import quick_imports
from pipelines.runs.view import View
from trainer.errors import LaunchError, SpecError, in_words

POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 10
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
MACHINERY = re.compile(r"executor|.*-driver|root")  # pods that KFP adds to each step


def connect(host: str) -> Any:
    """A client for the backend at `host`.

    Raises:
        SpecError: no host was given.
        LaunchError: it does not answer.
    """
    if not host:
        raise SpecError("--host is missing; give the address of Kubeflow Pipelines, or set KFP_HOST")
    # The client retries silently for half a minute before it gives up; one quick request tells sooner.
    try:
        with urllib.request.urlopen(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=TIMEOUT_SECONDS):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise LaunchError(f"Kubeflow Pipelines does not answer at {host} ({in_words(reason)}); check --host") from None
    with quick_imports():
        from kfp import Client

    with warnings.catch_warnings(action="ignore"):
        return Client(host=host)


def url(host: str, run_id: str) -> str:
    """The run's page in the web interface."""
    return f"{host.rstrip('/')}/#/runs/details/{run_id}"


@contextmanager
def refusals(host: str, doing: str) -> Iterator[None]:
    """Turn an API error inside the block into one line.

    Raises:
        LaunchError: the backend refused the request.
    """
    import kfp_server_api

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise LaunchError(f"{host} refused {doing}: {error.reason} ({error.status})") from None


def follow_run(client: Any, run_id: str, console: Console) -> None:
    """Print each step's state as it changes, until the run has ended.

    Raises:
        LaunchError: it did not succeed.
    """
    shown: dict[str, tuple[str, str]] = {}  # by id: the iterations of a ParallelFor share one name
    for run in _until_ended(client, run_id):
        for task in _steps(run):
            key, now = task.task_id or task.display_name, (task.display_name, task.state)
            if shown.get(key) != now:
                shown[key] = now
                console.print(f"{task.display_name}: {task.state.lower()}", highlight=False)
    if run.state != "SUCCEEDED":
        failed = dict.fromkeys(name for name, state in shown.values() if state == "FAILED")
        where = f"; failed: {', '.join(failed)}" if failed else ""
        raise LaunchError(f"the run ended as {run.state.lower()}{where}; the logs of its steps say why")


def _until_ended(client: Any, run_id: str) -> Iterator[Any]:
    """Yield the run every few seconds until it has ended; server errors (a backend that restarts) are retried.

    Raises:
        LaunchError: the backend refuses the request.
    """
    import kfp_server_api
    import urllib3

    while True:
        try:
            run = client.get_run(run_id)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            status = getattr(error, "status", None) or 500
            if status < 500:
                reason = getattr(error, "reason", error)
                raise LaunchError(f"run {run_id} cannot be followed: {reason} ({status})") from None
        else:
            yield run
            if run.state in ENDED:
                return
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class KfpRun:
    """A run by its id. Each operation connects again and raises as `connect`; LaunchError for an unknown run."""

    name: str
    host: str

    def view(self) -> View:
        run = self._asked()
        failed = ", ".join(task.display_name for task in _steps(run) if task.state == "FAILED")
        said = [run.error.message] if run.error and run.error.message else []
        said += [f"failed: {failed}; see: yaongi logs {self.name} --task {failed.split(', ')[0]}"] if failed else []
        rows = [("step", f"{task.display_name}: {task.state.lower()}") for task in _steps(run)]
        rows = [("run", self.name), *rows, ("page", url(self.host, self.name))]
        return View(run.display_name or self.name, self.host, run.state.lower(), "; ".join(said), rows=rows)

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        """Print the logs of the steps' pods so far, one step after another; `rank` is ignored."""
        if follow:
            follow_run(connect(self.host), self.name, console)
        run = self._asked()
        steps = [step for step in _steps(run) if task in ("", step.display_name)]
        if not steps:
            known = ", ".join(step.display_name for step in _steps(run)) or "none yet"
            raise LaunchError(f"run {self.name} has no step '{task}'; it has: {known}")
        for step in steps:
            print(f"▶ {step.display_name} ({step.state.lower()})")
            for child in step.child_tasks or []:
                if child.pod_name:
                    print(_pod_log(self.host, child.pod_name, self.name).rstrip("\n"))

    def stop(self, write: Callable[[str], None]) -> str:
        """Terminate the run. That kills the steps without a signal; the pipeline's exit handler then deletes the
        training job, whose workers save a checkpoint."""
        client = connect(self.host)
        with refusals(self.host, f"to stop run {self.name}"):
            run = client.get_run(self.name)
            if run.state in ENDED:
                raise LaunchError(f"run {self.name} has ended already, as {run.state.lower()}")
            client.terminate_run(self.name)
        *_, run = _until_ended(client, self.name)
        return f"run {self.name} ended as {run.state.lower()}; submit its job again to continue"

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        now = self.view()
        raise LaunchError(
            f"run {self.name} is {now.state}; Kubeflow Pipelines cannot restart a run: submit its job again to continue"
        )

    def why(self) -> str:
        now = self.view()
        return f"{now.name}, on {now.where}, is {now.state}" + (f": {now.why}" if now.why else "")

    def _asked(self) -> Any:
        """The run's current state on the backend."""
        client = connect(self.host)
        with refusals(self.host, f"run {self.name}"):
            return client.get_run(self.name)


def _pod_log(host: str, pod: str, run_id: str) -> str:
    """The log from the web interface, or the reason why it is missing."""
    query = urllib.parse.urlencode({"podname": pod, "runid": run_id})
    try:
        with urllib.request.urlopen(f"{host.rstrip('/')}/k8s/pod/logs?{query}", timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode(errors="replace")
    except OSError as error:
        return f"no log of pod {pod}: {getattr(error, 'reason', error)}; only the web interface serves it"


def _steps(run: Any) -> list[Any]:
    """The pipeline's steps that have begun."""
    details = run.run_details.task_details if run.run_details else None
    named = [task for task in details or [] if task.display_name and task.state]
    return [task for task in named if not MACHINERY.fullmatch(task.display_name)]
