"""Grafana dashboards as code; `python -m manifests.generate` writes their JSON into the chart.

The JSON is what gets installed. The code needs grafana-foundation-sdk, a development dependency; `query` does not.
"""

from __future__ import annotations

import json


def files() -> dict[str, str]:
    """File name → JSON of each dashboard."""
    from manifests.dashboards.cluster import cluster
    from manifests.dashboards.data import data
    from manifests.dashboards.serving import serving
    from manifests.dashboards.training import training

    made = {"training": training(), "data": data(), "cluster": cluster(), "serving": serving()}
    return {f"{name}.json": json.dumps(content, indent=1) + "\n" for name, content in made.items()}
