"""Run the pipeline on Kubeflow Pipelines and follow it."""

from __future__ import annotations

import tempfile
import warnings
import webbrowser
from pathlib import Path
from typing import Any

from rich.console import Console

from components.plan.step import arguments_for
from manifests.spec import changes_of, job_from
from pipelines.compile import write
from pipelines.runs import kfp
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
    client = kfp.connect(host)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        package = Path(scratch) / "pretrain.yaml"
        write(package)
        with kfp.refusals(host, "the run"):
            run = client.create_run_from_pipeline_package(
                str(package),
                arguments=arguments_for(preset, wanted) | ({"image": image} if image else {}),
                run_name=job.run_name,
                experiment_name=EXPERIMENT,
            )
    page = kfp.url(host, run.run_id)
    console.print(f"run {job.run_name}: {page}", highlight=False, soft_wrap=True)
    if browse and not webbrowser.open(page):
        console.print("no browser could be opened here", style="dim")
    if follow:
        kfp.follow_run(client, run.run_id, console)
    return run.run_id
