"""The parts of a JobSpec about places: volumes, the cluster, its monitoring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manifests.dataspec import Name
from manifests.kinds import JobKindName
from trainer.kinds.base import Count
from trainer.spec import NonNegative, Positive
from trainer.specbase import Spec


class StorageSpec(Spec):
    """The places of the two directory trees: mount paths (or local folders) and their claims.

    Relative paths of sources start in `sources_dir`: the job file's folder, or without a file the working directory.
    """

    sources_dir: str | None = None
    datasets_dir: str = "/mnt/datasets"
    checkpoints_dir: str = "/mnt/checkpoints"
    datasets_pvc: Name = "llm-datasets-pvc"
    checkpoints_pvc: Name = "llm-checkpoints-pvc"


class TolerationSpec(Spec):
    """A toleration of the training pods, with Kubernetes' field names."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class ClusterSpec(Spec):
    """The training job's resources on the cluster, or on this machine if `target` is local.

    Ranks = nodes × max(gpus_per_node, 1). `gpu_memory_gib` is the memory of each GPU: a model that cannot fit is
    refused before any work. `job` is the kind that the cluster's operator serves: PyTorchJob (training operator v1) or
    TrainJob (Kubeflow Trainer v2). `ttl_seconds_after_finished` has no effect on TrainJobs.
    """

    target: Literal["kubernetes", "local"] = "kubernetes"
    job: JobKindName = "pytorchjob"
    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 0
    gpu_memory_gib: Positive = 80
    cpus_per_node: Positive = 2
    memory_gib_per_node: Positive = 4
    shared_memory_gib: Positive = 1
    image: str = "localhost/yaongi-trainer:0.1.0"
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    namespace: str | None = None
    queue: str | None = None
    priority_class: str | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[TolerationSpec] = []
    queue_timeout_seconds: Count = 86_400
    start_timeout_seconds: Count = 1_800
    run_timeout_seconds: Count = 14 * 86_400
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] = 86_400
    grace_seconds: Count = 120

    @property
    def deadline_seconds(self) -> int:
        """The deadline for the operators, which count from the job's creation and so include waiting; the entrypoint
        limits the run itself."""
        return self.queue_timeout_seconds + self.start_timeout_seconds + self.run_timeout_seconds

    @property
    def ranks_per_node(self) -> int:
        return max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class ObservabilitySpec(Spec):
    """Labels by which the cluster's Prometheus selects monitors."""

    monitor_labels: dict[str, str] = {"release": "kube-prometheus-stack"}
    scrape_interval_seconds: NonNegative = 15
