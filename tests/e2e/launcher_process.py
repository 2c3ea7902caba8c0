"""A launcher in a process of its own, for tests that signal it: reads {namespace, job, spec, limits} from stdin."""

from __future__ import annotations

import json
import sys

from components.launch.kubernetes import launch
from components.launch.kubernetes_api import Cluster
from manifests.spec import ClusterSpec

if __name__ == "__main__":
    given = json.load(sys.stdin)
    launch(Cluster.connect(given["namespace"]), given["job"], given["spec"], ClusterSpec(**given["limits"]))
