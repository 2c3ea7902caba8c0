"""The pods of a run's steps on the cluster of the backend, where a kubeconfig is there and leads to it."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

from components.cluster import state
from components.cluster.kubeconfig import require_cluster
from manifests.kinds import Object
from trainer.errors import LaunchError

if TYPE_CHECKING:  # the import takes a second, which is not needed without a kubeconfig
    from components.cluster.api import Cluster

WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # Argo's, on every pod of a run
CONTAINER = "main"  # the others are Argo's
# Of an event: its reason, how its message begins, and the reason that Argo's message of such a pod has.
REASONS = (
    ("FailedScheduling", "", "Unschedulable"),
    ("Failed", "Failed to pull", "ErrImagePull"),
    ("Failed", "Error: secret", "CreateContainerConfigError"),
    ("Failed", "Error: configmap", "CreateContainerConfigError"),
)


class StepPods:
    """The pods of one workflow; an unreachable or foreign cluster has none of them."""

    def __init__(self, workflow: str, namespace: str) -> None:
        self.workflow, self.namespace = workflow, namespace

    @functools.cached_property
    def cluster(self) -> Cluster | None:
        """The cluster that runs them; None if there is no kubeconfig, or it leads to another cluster."""
        try:
            require_cluster()
            from components.cluster.api import Cluster

            found = Cluster.connect(self.namespace)
            return found if self.workflow and self._listed(found) else None
        except LaunchError:
            return None

    def all(self) -> list[Object]:
        return self._listed(self.cluster) if self.cluster else []

    def log(self, pod: str) -> str | None:
        """What the step in `pod` has written; None if that cannot be read."""
        if self.cluster is None:
            return None
        try:
            read = self.cluster.core.read_namespaced_pod_log
            options = {"container": CONTAINER, "_preload_content": False}
            response = self.cluster.call("get pods/log", read, pod, self.namespace, **options)
        except LaunchError:
            return None
        text: str = response.data.decode("utf-8", "replace")
        return text

    def hindrance(self, pod: str) -> str:
        """Why a pod did not start, in Argo's form `Reason: message`; "" if it did, or nobody knows any more. The
        cluster keeps events for an hour; Argo forgets the reason with the run's end."""
        if self.cluster is None:
            return ""
        try:
            options = {"field_selector": f"involvedObject.name={pod},type=Warning", "_preload_content": False}
            read = self.cluster.core.list_namespaced_event
            response = self.cluster.call("list events", read, self.namespace, **options)
        except LaunchError:
            return ""
        events = sorted(json.loads(response.data)["items"], key=state.event_time)
        for event in reversed(events):
            for reason, begins, as_argo in REASONS:
                if event.get("reason") == reason and event["message"].startswith(begins):
                    return f"{as_argo}: {event['message']}"
        return ""

    def _listed(self, cluster: Cluster) -> list[Object]:
        options = {"label_selector": f"{WORKFLOW_LABEL}={self.workflow}", "_preload_content": False}
        response = cluster.call("list pods", cluster.core.list_namespaced_pod, self.namespace, **options)
        found: list[Object] = json.loads(response.data)["items"]
        return found
