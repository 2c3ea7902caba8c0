"""A real Prometheus in the namespace; it finds workers by the names that the training operator gives them."""

from __future__ import annotations

import json
import os
from urllib.parse import urlencode

from kube import Namespace, Object, pod

IMAGE = os.environ.get("YAONGI_PROMETHEUS_IMAGE", "localhost/prometheus:2.42")
PORT = 9400


class Prometheus:
    """Queries go through the API server's proxy, so that they work wherever kubectl does."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def start(self, workers: list[str]) -> None:
        """Scrape `workers` every second; each is a pod with one rank and a headless service of the pod's name."""
        targets = {
            "names": [f"{worker}.{self.namespace.name}.svc.cluster.local" for worker in workers],
            "type": "A",
            "port": PORT,
            "refresh_interval": "1s",
        }
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "yaongi", "dns_sd_configs": [targets]}],
        }
        config_map: Object = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "prometheus"},
            "data": {"prometheus.yml": json.dumps(config)},
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

    def query(self, expression: str) -> list[Object]:
        """Result of an instant query: [{"metric": labels, "value": [time, text]}]; "values" for a range selector."""
        path = f"/api/v1/namespaces/{self.namespace.name}/pods/prometheus:9090/proxy/api/v1/query"
        answer = json.loads(self.namespace.kubectl("get", "--raw", f"{path}?{urlencode({'query': expression})}"))
        assert answer["status"] == "success", answer
        return answer["data"]["result"]
