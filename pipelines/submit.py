"""Run the pipeline on Kubeflow Pipelines and follow it."""

from __future__ import annotations

import json
import urllib.parse
import webbrowser
from typing import Any

import yaml
from rich.console import Console

from components.plan.step import arguments_for
from manifests.spec import changes_of, job_from
from pipelines.compile import compiled
from pipelines.runs.kfp import run as kfp
from pipelines.runs.kfp.backend import Backend, connect
from pipelines.runs.kfp.workflow import LOADER
from trainer.errors import SpecError
from trainer.specbase import deep_merge

EXPERIMENT = "yaongi"


def submit(
    preset_or_file: str,
    changes: dict[str, Any],
    *,
    host: str,
    follow: bool,
    console: Console,
    image: str = "",
    browse: bool = False,
) -> str:
    """Create a run of the pipeline on `host`; returns its id.

    Args:
        image: image of the pipeline's steps; "" for that of the compiled pipeline. The trainer's is `cluster.image`.
        browse: open the run's page in a browser.

    Raises:
        SpecError: the job is wrong, or no host was given.
        LaunchError: the host cannot be reached or refuses; with `follow`, also if the run does not succeed.
    """
    preset, wanted = changes_of(preset_or_file)
    wanted = deep_merge(wanted, changes)
    job = job_from({"preset": preset} if preset else {}, wanted, preset_or_file)
    if job.cluster.target != "kubernetes":
        raise SpecError("cluster.target: a submitted run trains on Kubernetes; remove the field")
    backend = connect(host)
    arguments = arguments_for(preset, wanted) | ({"image": image} if image else {})
    run_id = _created(backend, job.run_name, arguments, job.cluster.namespace)
    page = kfp.url(host, run_id)
    console.print(f"run {job.run_name}: {page}", highlight=False, soft_wrap=True)
    if browse and not webbrowser.open(page):
        console.print("no browser could be opened here", style="dim")
    if follow:
        kfp.follow_run(backend, run_id, console)
    return run_id


def _created(backend: Backend, name: str, arguments: dict[str, Any], namespace: str | None) -> str:
    """Create a run; returns its id.

    Args:
        namespace: where its pods run, on a backend with several users: those have a namespace each.
    """
    if backend.multi_user and not namespace:
        raise SpecError(
            f"cluster.namespace is missing: {backend.host} is shared by users who have a namespace each; give yours"
        )
    place = {"namespace": namespace} if backend.multi_user else {}
    predicate = {"operation": "EQUALS", "key": "display_name", "string_value": EXPERIMENT}
    query = urllib.parse.urlencode({"filter": json.dumps({"predicates": [predicate]}), **place})
    found = backend.get(f"/apis/v2beta1/experiments?{query}", "its experiments").get("experiments")
    made = {"display_name": EXPERIMENT, **place}
    experiment = found[0] if found else backend.post("/apis/v2beta1/experiments", f"the experiment {EXPERIMENT}", made)
    spec, platforms = yaml.load_all(compiled(), LOADER)
    body = {
        "display_name": name,
        "experiment_id": experiment["experiment_id"],
        "pipeline_spec": {"pipeline_spec": spec, "platform_spec": platforms},
        "runtime_config": {"parameters": arguments},
    }
    return str(backend.post("/apis/v2beta1/runs", "the run", body)["run_id"])
