"""Run the pipeline on Kubeflow Pipelines and follow it."""

from __future__ import annotations

import tempfile
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from components.launch import LaunchError
from components.plan.step import arguments_for
from manifests.spec import changes_of, job_from
from pipelines.compile import write
from trainer.specbase import SpecError, deep_merge

EXPERIMENT = "yaongi"
POLL_SECONDS = 5.0
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


def submit(
    preset_or_file: str, changes: dict[str, Any], *, host: str, follow: bool, console: Console, image: str = ""
) -> str:
    """Create a run of the pipeline on `host`; returns its id.

    Args:
        image: what the pipeline's steps run in; "" for the compiled pipeline's own. The trainer's is `cluster.image`.

    Raises:
        SpecError: the job is wrong, or no host was given.
        LaunchError: the host cannot be reached or refuses; with `follow`, also a run that does not succeed.
    """
    preset, wanted = changes_of(preset_or_file)
    wanted = deep_merge(wanted, changes)
    job = job_from({"preset": preset} if preset else {}, wanted, preset_or_file)
    if job.cluster.target != "kubernetes":
        raise SpecError("cluster.target: a submitted run trains on Kubernetes; remove the field")
    client = _connect(host)
    import kfp_server_api

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        package = Path(scratch) / "pretrain.yaml"
        write(package)
        try:
            run = client.create_run_from_pipeline_package(
                str(package),
                arguments=arguments_for(preset, wanted) | ({"image": image} if image else {}),
                run_name=job.run_name,
                experiment_name=EXPERIMENT,
            )
        except kfp_server_api.ApiException as error:
            raise LaunchError(f"{host} refused the run: {error.reason} ({error.status})") from None
    console.print(f"run {job.run_name}: {host.rstrip('/')}/#/runs/details/{run.run_id}", highlight=False)
    if follow:
        _follow(client, run.run_id, console)
    return run.run_id


def _connect(host: str) -> Any:
    if not host:
        raise SpecError("--host is missing; give the address of Kubeflow Pipelines, or set KFP_HOST")
    # The client retries for half a minute without a word before it gives up; ask once, quickly, instead.
    try:
        with urllib.request.urlopen(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=10):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise LaunchError(f"Kubeflow Pipelines does not answer at {host} ({reason}); check --host") from None
    from kfp import Client

    with warnings.catch_warnings(action="ignore"):
        return Client(host=host)


def _follow(client: Any, run_id: str, console: Console) -> None:
    """Print each step's state as it changes, until the run has ended."""
    shown: dict[str, str] = {}
    while True:
        run = client.get_run(run_id)
        details = run.run_details.task_details if run.run_details else None
        for task in details or []:
            if task.display_name and task.state and shown.get(task.display_name) != task.state:
                shown[task.display_name] = task.state
                console.print(f"{task.display_name}: {task.state.lower()}", highlight=False)
        if run.state in ENDED:
            break
        time.sleep(POLL_SECONDS)
    if run.state != "SUCCEEDED":
        failed = [name for name, state in shown.items() if state == "FAILED"]
        where = f"; failed: {', '.join(failed)}" if failed else ""
        raise LaunchError(f"the run ended as {run.state.lower()}{where}; the logs of its steps say why")
