"""The report of a run: one self-contained HTML file.

It is written after evaluation and after export; parts that do not exist yet are left out.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.evaluation.scores import inner_rows, limited, rows
from trainer.files import atomic_write
from trainer.recording.advice import advice
from trainer.recording.trackers.state import links
from trainer.report.charts import line_chart
from trainer.report.curves import curves, validation_curves
from trainer.report.pages import page
from trainer.report.run import Run, read_run
from trainer.report.sections import facts, ledger, restarts, samples, scale, time_spent
from trainer.report.settings import dates, hyperparameters
from trainer.specbase import to_yaml

log = logging.getLogger(__name__)

REPORT = "report.html"


def write_report(run_dir: str | Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Write run_dir/report.html from what lies in the directory; returns its path.

    Args:
        evaluation: shown instead of the directory's eval.json, by whoever is about to write that.

    Raises:
        SpecError: train.yaml is missing or unusable.
        CheckpointError: a file of the run is damaged.
    """
    path, run = Path(run_dir) / REPORT, read_run(run_dir)
    if evaluation is not None:
        run = replace(run, evaluation=evaluation)
    atomic_write(path, render(run).encode())
    return path


def update_report(run_dir: str | Path, evaluation: dict[str, Any] | None = None) -> None:
    """`write_report` for a task, which must not fail because of its report: a problem is a warning, and the page says
    it."""
    try:
        write_report(run_dir, evaluation)
    except Exception as error:  # a bug here, or a file that something else damaged
        problem = f"{type(error).__name__}: {error}"
        log.warning("the report could not be made (%s)", problem)
        text = page("failed.html.j2", title=Path(run_dir).name, problem=problem)
        with suppress(OSError):
            atomic_write(Path(run_dir) / REPORT, text.encode())


def render(run: Run) -> str:
    """The page."""
    listed, causes = restarts(run)
    validation = line_chart("Validation", "bits per byte by domain", validation_curves(run), x_name="token", wide=True)
    return page(
        "report.html.j2",
        title=run.spec.run,
        run=run,
        facts=facts(run),
        advice=advice(run.steps, run.spec, run.validations),
        benchmarks=rows(run.evaluation or {}),
        inner_benchmarks=inner_rows(run.evaluation or {}),
        limited=limited(run.evaluation or {}),
        curves=curves(run),
        validation=validation,
        validated=len(run.validations),
        ledger=ledger(run),
        goodput=time_spent(run),
        restarts=listed,
        causes=causes,
        samples=samples(run),
        hyperparameters=hyperparameters(run.spec, run.rows),
        dates=dates(run.directory),
        links=links(run.directory),
        spec_yaml=to_yaml(run.spec),
        widest=scale([each["bits_per_byte"] for each in run.evaluation["domains"].values()] if run.evaluation else []),
    )
