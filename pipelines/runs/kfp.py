"""Runs on Kubeflow Pipelines: connect, follow, show, print logs, stop.

All through the v2beta1 API of the kfp client, but for logs: those the web interface serves, at the same address.
"""

from __future__ import annotations

import re
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from components.quick import quick_imports
from pipelines.runs.view import View
from trainer.errors import LaunchError, in_words
from trainer.specbase import SpecError

POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 10
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
MACHINERY = re.compile(r"executor|.*-driver|root")  # pods that KFP puts beside each step


def connect(host: str) -> Any:
    """A client for the backend at `host`.

    Raises:
        SpecError: no host was given.
        LaunchError: it does not answer.
    """
    if not host:
        raise SpecError("--host is missing; give the address of Kubeflow Pipelines, or set KFP_HOST")
    # The client retries for half a minute without a word before it gives up; ask once, quickly, instead.
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
    """Turn the backend's refusal of what the block asks into one line.

    Raises:
        LaunchError
    """
    import kfp_server_api

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise LaunchError(f"{host} refused {doing}: {error.reason} ({error.status})") from None


def follow(client: Any, run_id: str, console: Console) -> None:
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
    """The run, asked for every few seconds, its end last; a backend that is being replaced is waited for.

    Raises:
        LaunchError: the backend refuses to tell.
    """
    import kfp_server_api
    import urllib3

    while True:
        try:
            run = client.get_run(run_id)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            status = getattr(error, "status", None) or 500
            if status < 500:
                raise LaunchError(f"run {run_id} cannot be followed: {error.reason} ({status})") from None
        else:
            yield run
            if run.state in ENDED:
                return
        time.sleep(POLL_SECONDS)


def view(host: str, run_id: str) -> View:
    """Raises: SpecError, LaunchError as `connect`; LaunchError for an unknown run."""
    client = connect(host)
    with refusals(host, f"run {run_id}"):
        run = client.get_run(run_id)
    failed = ", ".join(task.display_name for task in _steps(run) if task.state == "FAILED")
    said = [run.error.message] if run.error and run.error.message else []
    said += [f"failed: {failed}; see: yaongi logs {run_id} --task {failed.split(', ')[0]}"] if failed else []
    rows = [("step", f"{task.display_name}: {task.state.lower()}") for task in _steps(run)]
    rows = [("run", run_id), *rows, ("page", url(host, run_id))]
    return View(run.display_name or run_id, host, run.state.lower(), "; ".join(said), rows=rows)


def stop(host: str, run_id: str) -> str:
    """Terminate a run and wait for its end; the state it ended in.

    Terminating kills the steps without a signal; the pipeline's exit handler then deletes the training job, whose
    workers save a checkpoint.

    Raises:
        SpecError, LaunchError: as `view`; the run has ended already.
    """
    client = connect(host)
    with refusals(host, f"to stop run {run_id}"):
        run = client.get_run(run_id)
        if run.state in ENDED:
            raise LaunchError(f"run {run_id} has ended already, as {run.state.lower()}")
        client.terminate_run(run_id)
    *_, run = _until_ended(client, run_id)
    return run.state.lower()


def show_logs(host: str, run_id: str, write: Callable[[str], None], *, task: str) -> None:
    """Print what the pods of a run's steps have written so far, one step after another.

    Args:
        task: only the step of this name; "" for all.

    Raises:
        SpecError, LaunchError: as `view`; no such step.
    """
    client = connect(host)
    with refusals(host, f"run {run_id}"):
        run = client.get_run(run_id)
    steps = [step for step in _steps(run) if task in ("", step.display_name)]
    if not steps:
        known = ", ".join(step.display_name for step in _steps(run)) or "none yet"
        raise LaunchError(f"run {run_id} has no step '{task}'; it has: {known}")
    for step in steps:
        write(f"▶ {step.display_name} ({step.state.lower()})")
        for child in step.child_tasks or []:
            if child.pod_name:
                write(_pod_log(host, child.pod_name, run_id).rstrip("\n"))


def _pod_log(host: str, pod: str, run_id: str) -> str:
    """The log as the web interface serves it, or why it does not."""
    query = urllib.parse.urlencode({"podname": pod, "runid": run_id})
    try:
        with urllib.request.urlopen(f"{host.rstrip('/')}/k8s/pod/logs?{query}", timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode(errors="replace")
    except OSError as error:
        return f"no log of pod {pod}: {getattr(error, 'reason', error)}; it is served by the web interface only"


def _steps(run: Any) -> list[Any]:
    """The steps of the pipeline that have begun."""
    details = run.run_details.task_details if run.run_details else None
    named = [task for task in details or [] if task.display_name and task.state]
    return [task for task in named if not MACHINERY.fullmatch(task.display_name)]
