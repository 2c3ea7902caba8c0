"""Scrape configuration for clusters with the Prometheus operator.

Series have the label `run` besides the operator's namespace and pod; alerts and dashboards select by it.
"""

from __future__ import annotations

import re

from manifests.kinds import Object
from manifests.names import APP, APP_LABEL, INSTANCE_LABEL, RUN_LABEL, SERVER_APP, STEP_APP, STEP_METRICS_PORT
from manifests.spec import JobSpec

KFP_RUN_LABEL = "pipeline/runid"  # set by Kubeflow Pipelines on every pod of a run


def pod_monitor(job: JobSpec) -> Object:
    """Scrapes every local rank of every run in its namespace."""
    return _pod_monitor(
        job, APP, [{"port": f"metrics-{rank}", "relabelings": [_run_from(RUN_LABEL)]} for rank in _ranks(job)]
    )


def step_monitor(job: JobSpec) -> Object:
    """Scrapes the pipeline's steps while they run.

    Kubeflow Pipelines does not allow container ports to be declared, and the operator's `portNumber` only selects
    declared ones; so the address is built here, for the step's container only. A step's `run` is the pipeline run's id.
    """
    relabelings = [
        {"sourceLabels": ["__meta_kubernetes_pod_container_name"], "regex": "main", "action": "keep"},
        {
            "sourceLabels": ["__meta_kubernetes_pod_ip"],
            "targetLabel": "__address__",
            "replacement": f"${{1}}:{STEP_METRICS_PORT}",
        },
        _run_from(KFP_RUN_LABEL),
    ]
    return _pod_monitor(job, STEP_APP, [{"relabelings": relabelings}])


def server_monitor(job: JobSpec) -> Object:
    """Scrapes servers of exported models; their `run` is the release that installed them."""
    return _pod_monitor(job, SERVER_APP, [{"port": "metrics", "relabelings": [_run_from(INSTANCE_LABEL)]}])


def _pod_monitor(job: JobSpec, app: str, endpoints: list[Object]) -> Object:
    interval = f"{job.observability.scrape_interval_seconds:g}s"
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": app, "labels": dict(job.observability.monitor_labels)},
        "spec": {
            "jobLabel": APP_LABEL,
            "selector": {"matchLabels": {APP_LABEL: app}},
            "podMetricsEndpoints": [{**endpoint, "interval": interval} for endpoint in endpoints],
        },
    }


def _run_from(label: str) -> Object:
    # Prometheus replaces characters that its label names do not allow by _.
    return {
        "sourceLabels": [f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9]', '_', label)}"],
        "targetLabel": "run",
    }


def _ranks(job: JobSpec) -> range:
    return range(job.cluster.ranks_per_node)
