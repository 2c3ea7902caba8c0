"""The queries of every panel of every dashboard, with a Prometheus that has scraped a run on the cluster."""

from __future__ import annotations

import pytest
from pipeline_run import PipelineRun
from scrape import Prometheus

from manifests.dashboards.query import View, dashboards, panels, series, targets

pytestmark = pytest.mark.e2e

# Panel → why an undisturbed run in FP32 on CPUs has no data for it; tests/pipelines/test_dashboards_live.py covers all
# except the first and the last three, which tests/trainer/test_proof.py sees set.
ELSEWHERE = {
    "Benchmarks": "the evaluation has none",
    "Held-out text": "the training is not validated",
    "Model FLOPs utilisation": "the peak of a CPU is not known",
    "FP8: largest magnitude": "no FP8",
    "FP8: clamped tensors": "no FP8",
    "Documents left out": "hygiene is off in the job",
    "Left out": "hygiene is off in the job",
    "Kernels": "a CPU proves none",
    "Proof": "a CPU proves no kernels",
    "Trial": "a CPU tries no ways",
}
# A data step of the sample corpus may start and end between two scrapes, which are a second apart.
TOO_SHORT = {
    *{"Bytes worked through", "Download", "Requests tried again", "Documents", "Text"},
    *{"Tokens", "Tokens prepared", "Verified files"},
}


def test_every_panel_shows_something(first: PipelineRun, prometheus: Prometheus) -> None:
    assert first.code == 0, first.log
    run = first.job.run_name
    chosen = {"namespace": first.namespace.name, "run": run, "pipeline": run}
    view = View(first.started - 5, first.ended + 5, 1.0, chosen, points=900)
    empty = {
        panel["title"]
        for name, content in dashboards().items()
        if name != "serving"  # no server runs here
        for panel in panels(content)
        for target in targets(panel)
        if all(one.is_empty for one in series(prometheus.ask, target, view))
    }
    print("panels without data:", sorted(empty))
    assert empty - TOO_SHORT == set(ELSEWHERE), empty
