"""What of a run is left on the cluster, where a kubeconfig is there and leads to the cluster of the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from components.cluster import state
from components.diagnose.causes import Obstacle
from components.plan.step import placement
from manifests.clusterspec import ClusterSpec
from manifests.kinds import KINDS, Object
from manifests.names import PIPELINE_LABEL, TASK_LABEL
from pipelines.runs.kfp.look import Look
from pipelines.runs.kfp.obstacle import obstacle
from trainer.errors import LaunchError

if TYPE_CHECKING:
    from components.cluster.api import Cluster
    from components.cluster.watch import LogFollower

DRAIN_SECONDS = 5


class Watched:
    """Pods and training jobs of one run.

    Attributes:
        where: kind, namespace and grace period of the run's training jobs.
    """

    def __init__(self, now: Look, write: Callable[[str], None]) -> None:
        parameters = now.run.get("runtime_config", {}).get("parameters", {})
        found = placement(str(parameters.get("preset", "tiny")), str(parameters.get("overrides", "{}")))
        self.where = found or ClusterSpec()  # None: the form is wrong, then `plan` has refused it
        self._selector = f"{PIPELINE_LABEL}={now.looker.run_id}"
        self._jobs: set[str] = set()  # also those that have been deleted: their pods outlive them
        self._pods = now.looker.pods
        self._cluster = self._connected(write)
        self._lines: list[str] = []
        self._follower: LogFollower | None = None

    @property
    def sees(self) -> bool:
        """Whether the cluster is in sight; without it nothing is known to be left."""
        return self._cluster is not None

    def workers(self) -> list[str]:
        """Training pods that have not ended; jobs that may still make some."""
        if self._cluster is None:
            return []
        kind = KINDS[self.where.job]
        jobs = self._cluster.jobs(kind, self._selector)
        self._jobs |= {job["metadata"]["name"] for job in jobs}
        pods = [pod for name in sorted(self._jobs) for pod in self._cluster.pods(kind, name)]
        self._follow(pods)
        running = [pod["metadata"]["name"] for pod in pods if not state.is_over(pod)]
        return running or [job["metadata"]["name"] for job in jobs if state.is_active(job)]

    def log(self) -> list[str]:
        """What rank 0 has written since the first call of `workers`, and ends following it."""
        if self._follower is not None:
            self._follower.finish(DRAIN_SECONDS)
        return self._lines

    def _follow(self, pods: list[Object]) -> None:
        """Rank 0 names its last checkpoint at its end; with its job the pod is deleted as soon as it has ended."""
        if self._follower is None and self._cluster is not None:
            from components.cluster.watch import LogFollower

            self._follower = LogFollower(self._cluster, self._lines.append)
            self._follower.start()
        index = KINDS[self.where.job].index_label
        for pod in pods:
            labels = pod["metadata"]["labels"]
            if labels.get(TASK_LABEL) == "train" and labels.get(index) == "0" and state.has_started(pod):
                assert self._follower is not None
                self._follower.add(pod)

    def steps(self) -> tuple[list[str], list[str]]:
        """Names of the steps' pods that have not ended, whatever the workflow says of them; and why further ones,
        which are none of these, will never run."""
        left = [pod for pod in self._pods.all() if not state.is_over(pod)]
        hindered = {pod["metadata"]["name"]: str(found) for pod in left if (found := _hindered(pod)) and found.pulling}
        names = [pod["metadata"]["name"] for pod in left]
        return [name for name in names if name not in hindered], list(hindered.values())

    def _connected(self, write: Callable[[str], None]) -> Cluster | None:
        steps = self._pods.cluster
        if steps is None:
            return None
        from components.cluster.api import Cluster

        try:
            cluster = Cluster.connect(self.where.namespace or steps.namespace)
            cluster.jobs(KINDS[self.where.job], self._selector)
            return cluster
        except LaunchError as error:
            write(f"stopping: without a look at the training: {error}")
            return None


def _hindered(pod: Object) -> Obstacle | None:
    """Why the container of a step, the first one that its node reports, does not start."""
    waiting = state.container_state(pod).get("waiting", {})
    return obstacle(f"{waiting.get('reason', '')}: {waiting.get('message', '')}") if waiting.get("message") else None
