"""A real Prometheus in the namespace, with the shipped alerts.

It finds workers by the names that their operator gives them, and drivers by a service that `PipelineRun` creates, since
Debian's Prometheus has no Kubernetes discovery; it labels them like the monitors of manifests/monitors.py.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlencode

from kube import Namespace, Object, pod

from manifests.alerts import rule_groups
from manifests.names import APP, STEP_APP, STEP_METRICS_PORT

IMAGE = os.environ.get("YAONGI_PROMETHEUS_IMAGE", "localhost/prometheus:2.42")
PORT = 9400


class Prometheus:
    """Queries use the API server's proxy, so that they work wherever kubectl works."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def start(self, workers: dict[str, list[str]], drivers: dict[str, str]) -> None:
        """Scrape, and evaluate the rules, every second.

        Args:
            workers: pods of each run, of one rank each, with a headless service of the pod's name.
            drivers: run of each pod that executes steps of the pipeline, with a headless service of its name.
        """
        scraped = [self._targets(APP, run, names, PORT) for run, names in workers.items()]
        scraped += [self._targets(STEP_APP, run, [name], STEP_METRICS_PORT) for name, run in drivers.items()]
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["/config/rules.json"],
            "scrape_configs": scraped,
        }
        config_map: Object = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "prometheus"},
            "data": {"prometheus.yml": json.dumps(config), "rules.json": json.dumps(rule_groups())},
        }
        server = pod(
            "prometheus",
            IMAGE,
            ["--config.file=/config/prometheus.yml"],
            mounts={},
            config_map=("/config", "prometheus"),
        )
        self.namespace.apply(config_map, server)
        self.namespace.running("prometheus")

    def _targets(self, app: str, run: str, pods: list[str], port: int) -> Object:
        space = self.namespace.name
        names = [f"{name}.{space}.svc.cluster.local" for name in pods]
        return {
            "job_name": f"{app}/{run}",
            "dns_sd_configs": [{"names": names, "type": "A", "port": port, "refresh_interval": "1s"}],
            "relabel_configs": [
                {"target_label": "job", "replacement": app},
                {"target_label": "namespace", "replacement": space},
                {"target_label": "run", "replacement": run},
                {"target_label": "pod", "source_labels": ["__meta_dns_name"], "regex": r"([^.]+)\..*"},
            ],
        }

    def firing(self, run: str) -> list[dict[str, str]]:
        """Labels of the alerts that are firing for a run."""
        return [series["metric"] for series in self.query(f'ALERTS{{alertstate="firing", run="{run}"}}')]

    def query(self, expression: str) -> list[Object]:
        """Result of an instant query: [{"metric": labels, "value": [time, text]}]; "values" for a range selector."""
        return self.ask("query", query=expression)["result"]

    def ask(self, path: str, **parameters: str | float) -> Any:
        """`data` of the response to a request to its HTTP API."""
        api = f"/api/v1/namespaces/{self.namespace.name}/pods/prometheus:9090/proxy/api/v1"
        answer = json.loads(self.namespace.kubectl("get", "--raw", f"{api}/{path}?{urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]
