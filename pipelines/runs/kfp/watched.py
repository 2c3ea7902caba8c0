"""What of a run is left on the cluster, where a kubeconfig is there and leads to the cluster of the backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from components.cluster import state
from components.cluster.kubeconfig import NoCluster, require_cluster
from components.plan.step import placement
from manifests.clusterspec import ClusterSpec
from manifests.kinds import KINDS, Object
from manifests.names import PIPELINE_LABEL
from pipelines.runs.kfp.look import Look
from trainer.errors import LaunchError

if TYPE_CHECKING:  # the import takes a second, which is not needed without a kubeconfig
    from components.cluster.api import Cluster

WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # Argo's, on every pod of a run


class Watched:
    """Pods and training jobs of one run.

    Attributes:
        sees: whether the cluster is in sight; without it nothing is known to be left.
        where: kind, namespace and grace period of the run's training jobs.
    """

    def __init__(self, now: Look, write: Callable[[str], None]) -> None:
        parameters = now.run.get("runtime_config", {}).get("parameters", {})
        found = placement(str(parameters.get("preset", "tiny")), str(parameters.get("overrides", "{}")))
        self.where = found or ClusterSpec()  # None: the form is wrong, then `plan` has refused it
        metadata = now.workflow.get("metadata", {})
        self._workflow, self._namespace = metadata.get("name", ""), metadata.get("namespace", "")
        self._selector = f"{PIPELINE_LABEL}={now.looker.run_id}"
        self._jobs: set[str] = set()  # also those that have been deleted: their pods outlive them
        self._cluster = self._connected(write) if self._workflow else None

    @property
    def sees(self) -> bool:
        return self._cluster is not None

    def workers(self) -> list[str]:
        """Training pods that have not ended; jobs that may still make some."""
        if self._cluster is None:
            return []
        kind = KINDS[self.where.job]
        jobs = self._cluster.jobs(kind, self._selector)
        self._jobs |= {job["metadata"]["name"] for job in jobs}
        pods = [pod for name in sorted(self._jobs) for pod in self._cluster.pods(kind, name)]
        running = [pod["metadata"]["name"] for pod in pods if not state.is_over(pod)]
        return running or [job["metadata"]["name"] for job in jobs if state.is_active(job)]

    def steps(self) -> list[str]:
        """Names of the pods of the run's steps that have not ended, whatever the workflow says of them."""
        return [pod["metadata"]["name"] for pod in self._step_pods(self._cluster) if not state.is_over(pod)]

    def _connected(self, write: Callable[[str], None]) -> Cluster | None:
        try:
            require_cluster()
            from components.cluster.api import Cluster

            cluster = Cluster.connect(self.where.namespace or self._namespace)
            if not self._step_pods(cluster):
                return None  # the cluster of something else
            cluster.jobs(KINDS[self.where.job], self._selector)
            return cluster
        except NoCluster:
            return None
        except LaunchError as error:
            write(f"stopping: without a look at the cluster: {error}")
            return None

    def _step_pods(self, cluster: Cluster | None) -> list[Object]:
        if cluster is None:
            return []
        selector = f"{WORKFLOW_LABEL}={self._workflow}"
        listed = cluster.core.list_namespaced_pod
        options = {"label_selector": selector, "_preload_content": False}
        return json.loads(cluster.call("list pods", listed, self._namespace, **options).data)["items"]
