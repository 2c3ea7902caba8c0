"""The queries of all panels, with a real Prometheus that has scraped a real run, killed once and resumed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tools import tool

from manifests.dashboards.query import View, dashboards, event_queries, panels, series, substituted, targets
from trainer.recording.metrics import METRICS, PREFIX

ROOT = Path(__file__).parents[2]
FILE = ROOT / "makers" / "dashboard_pictures.py"
SAMPLE = ROOT / "components" / "download" / "sample" / "ko.jsonl.gz"
STEPS, KILLED_AT, CHECKPOINT_EVERY = 28, 16, 7
# Panel → why this run has no data for it. tests/e2e/test_dashboards_cluster.py covers all of these except the first and
# those of a proof, whose metrics tests/trainer/test_proof.py sees set.
ELSEWHERE = {
    "Benchmarks": "the evaluation has none",
    "Held-out text": "the training is not validated",
    "Model FLOPs utilisation": "the peak of a CPU is not known",
    "Replaced pods": "there are no pods",
    "Kernels": "a CPU proves none",
    "Proof": "a CPU proves no kernels",
    "Trial": "a CPU tries no ways",
    "Phase of the job": "the local launcher has no phases",
    "Time in each phase": "the local launcher has no phases",
    "Renewals of the lease": "the local launcher has no lease",
}
# That of servers has a test of its own, tests/trainer/test_serving.py.
OF_RUNS = {name: content for name, content in dashboards().items() if name != "serving"}
# The sample's Korean source, repeated, so that each data step lasts for several scrapes.
COPIES = 24
# Files are verified at the speed of a disk, within less than two scrapes.
TOO_SHORT = {"Verified files"}
# Counter → why it does not rise here.
STILL = {
    "checkpoint_failures_total": "no checkpoint fails",
    "download_retries_total": "nothing is fetched over a network",
    "fp8_overflows_total": "numbers may stay below what the history foresees",
}

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("dashboard_pictures", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboard_pictures"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["dashboard_pictures"]


def write_corpus(path: Path) -> Path:
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as sample, path.open("w", encoding="utf-8") as corpus:
        for document in map(json.loads, sample):
            for copy in range(COPIES):
                corpus.write(json.dumps({"text": f"{document['text']}\n{copy}"}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def watched(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, View]]:
    """(how to ask Prometheus, the whole story)"""
    tool("prometheus")
    workdir = tmp_path_factory.mktemp("watched")
    corpus = write_corpus(workdir / "corpus.jsonl")
    sets = [f"train.steps={STEPS}", *maker.SMALL_STEPS, f"train.checkpoint.every_steps={CHECKPOINT_EVERY}"]
    run = maker.WatchedRun(workdir, "tiny", [*sets, f'data.sources.ko.origin.paths=["{corpus}"]'])
    with run.prometheus:
        started = time.time()
        run.tell(KILLED_AT)
        yield run.prometheus.ask, run.view(started)


def test_every_panel_shows_something(watched: tuple[Any, View]) -> None:
    ask, view = watched
    empty = {
        panel["title"]
        for content in OF_RUNS.values()
        for panel in panels(content)
        for target in targets(panel)
        if all(one.is_empty for one in series(ask, target, view))
    }
    empty -= TOO_SHORT
    assert empty == set(ELSEWHERE), f"without data: {empty - set(ELSEWHERE)}; not expected: {set(ELSEWHERE) - empty}"


def test_panels_show_the_same_whatever_is_chosen_of_one_run(watched: tuple[Any, View]) -> None:
    """A separate Prometheus adds no labels: the choice All must include series without them."""
    ask, view = watched
    everything = View(view.start, view.end, view.scrape_interval, {})
    for content in OF_RUNS.values():
        for panel in panels(content):
            for target in targets(panel):
                found = [repr(series(ask, target, each)) for each in (view, everything)]  # nan does not equal itself
                assert found[0] == found[1], panel["title"]


def test_counters_count(watched: tuple[Any, View]) -> None:
    ask, view = watched
    span = f"[{int(view.end - view.start) + 1}s]"
    still = set()
    for metric in METRICS:
        if metric.kind != "counter" or "trainer" not in metric.processes:
            continue
        name = PREFIX + metric.name
        query = f"max(max_over_time({name}{span}) - min_over_time({name}{span}))"
        (found,) = ask("query", query=query, time=view.end)["result"]
        if float(found["value"][1]) <= 0:
            still.add(metric.name)
    assert still <= set(STILL), f"never raised between two scrapes: {still - set(STILL)}"


def test_the_restart_and_every_checkpoint_are_marked(watched: tuple[Any, View]) -> None:
    ask, view = watched
    marks = event_queries(dashboards()["training"])

    def asked(name: str) -> list[dict[str, Any]]:
        query = substituted(marks[name], view)
        return ask("query_range", query=query, start=view.start, end=view.end, step=view.step)["result"]

    (restart,) = asked("Restarts")
    assert restart["metric"]["reason"] == "killed"
    (saved,) = asked("Checkpoints")
    times = {float(value) / 1000 for _, value in saved["values"]}
    assert all(view.start < at < view.end for at in times)
    assert len(times) >= 2, "of four, the last of which may come too late to be scraped"
