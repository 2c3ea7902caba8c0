"""A launcher in a separate process, for tests that end it: its argument is {namespace, objects, limits} as JSON."""

from __future__ import annotations

import json
import sys

from components.cluster.api import Cluster
from components.launch.kubernetes import launch
from manifests.clusterspec import ClusterSpec

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    launch(Cluster.connect(given["namespace"]), given["objects"], ClusterSpec(**given["limits"]))
