"""Alerts evaluated by a real Prometheus over a real run: none in normal operation, the right one for a stopped rank."""

from __future__ import annotations

import pytest
from kube import wait_for
from pipeline_run import ON_CLUSTER, RUN_TIMEOUT, SETS, PipelineRun, driver
from scrape import Prometheus

from manifests.spec import load_job
from trainer.specbase import changes_from_sets

pytestmark = pytest.mark.e2e

LAUNCH = (
    "import sys; from components.launch.step import run; from components.running import step;"
    "from manifests.spec import job_from_json;\n"
    "with step('train'): run(job_from_json(sys.argv[1]), 'train')"
)
# The rank's own process, not its parent, the entrypoint; found by its arguments, since the image has no pkill.
SIGNAL = """
import os, sys
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        arguments = open(f"/proc/{pid}/cmdline").read().split("\\0")
    except OSError:  # it has ended meanwhile
        continue
    if "trainer" in arguments:
        os.kill(int(pid), int(sys.argv[1]))
        print("signal", sys.argv[1], "to process", pid)
"""
STOP, CONTINUE = "19", "18"


def test_a_run_that_nothing_disturbs_fires_no_alert(first: PipelineRun, prometheus: Prometheus) -> None:
    assert first.code == 0, first.log
    of_run = f'run="{first.job.run_name}"'
    seen = prometheus.query(f"count by (alertname, alertstate) (last_over_time(ALERTS{{{of_run}}}[{first.since}]))")
    print("alerts of the run, pending ones included:", [series["metric"] for series in seen])
    assert not [series for series in seen if series["metric"]["alertstate"] == "firing"]
    (progress,) = prometheus.query(f"last_over_time(run:yaongi_progress:ratio{{{of_run}}}[{first.since}])")
    assert float(progress["value"][1]) > 0.5, "the rules are not evaluated over this run"


def test_a_stopped_rank_is_named_by_an_alert_which_ends_when_it_goes_on(
    first: PipelineRun, prometheus: Prometheus
) -> None:
    assert first.code == 0, first.log
    namespace = first.namespace
    job = load_job("tiny", changes_from_sets(["name=stopped", *SETS, *ON_CLUSTER]))
    command = ["python", "-c", LAUNCH, job.model_dump_json()]
    namespace.apply(*driver("stopped", command))
    run = PipelineRun(namespace, "stopped", job)
    victim = run.workers[1]

    wait_for("step 5", lambda: len(run.read("logs/metrics.jsonl").splitlines()) >= 5, RUN_TIMEOUT, every=0.5)
    print(namespace.execute(victim, "python", "-c", SIGNAL, STOP))
    fired = wait_for("an alert", lambda: prometheus.firing(job.run_name), 600)
    print("firing:", fired)
    down = [labels for labels in fired if labels["alertname"] == "YaongiTargetDown"]
    assert [(found["run"], found["pod"], found["severity"]) for found in down] == [(job.run_name, victim, "critical")]
    beat = f'yaongi_heartbeat_timestamp_seconds{{run="{job.run_name}", rank="0"}}'
    (age,) = prometheus.query(f"time() - last_over_time({beat}[1m])")  # one scrape may have come too late
    print(f"rank 0 waits: its last step was {float(age['value'][1]):.0f} s ago")
    assert float(age["value"][1]) > 30

    print(namespace.execute(victim, "python", "-c", SIGNAL, CONTINUE))
    wait_for("the alert to end", lambda: not prometheus.firing(job.run_name), 300)
    run.finish()
    assert run.code == 0, run.log
    assert run.losses == first.losses
