"""The parts of a JobSpec about places: volumes, the cluster, its monitoring."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from manifests import fabric, workerspec
from manifests.dataspec import Name
from manifests.kinds import JobKindName
from trainer.fabric import FabricName
from trainer.kinds.base import Count
from trainer.runtimespec import Positive
from trainer.spec import NonNegative
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


class TopologySpec(Spec):
    """Place all workers of a job near each other: node label of a level of Kueue's topology, such as a rack.

    `required`: the job waits until one domain of this level has room for all workers; `preferred`: several domains if
    need be.
    """

    required: workerspec.NodeLabel | None = None
    preferred: workerspec.NodeLabel | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.required is None) == (self.preferred is None):
            raise ValueError("write either required or preferred, with the node label of a level of the topology")
        return self


class ClusterSpec(Spec):
    """The training job's resources on the cluster, or on this machine if `target` is local.

    Ranks = nodes × max(gpus_per_node, 1). `gpu_memory_gib` is the memory of each GPU: a model that cannot fit is
    refused before any work. `job` is the kind that the cluster's operator serves: PyTorchJob (training operator v1) or
    TrainJob (Kubeflow Trainer 2.1 to 2.3). `ttl_seconds_after_finished` has no effect on TrainJobs.

    `queue` is a LocalQueue of Kueue, `queue_priority` the job's WorkloadPriorityClass there: it decides who waits and
    who is preempted. `priority_class` is the PriorityClass of its pods, for the scheduler.

    Of the training pods only: `env`, `labels`, `annotations`; `resources`, extended ones and huge pages of each pod;
    `devices`, the number of each device class (DRA); `ulimits`, -1 for unlimited, applied by containerd's NRI plugin
    ulimit-adjuster; `fabric`, the network between nodes, which NCCL must then take; `spread`. See docs/fabric.md.
    `hub_secret` and `judge_secret` have a key `token`. Those of train.trackers have the names of variables as keys:
    `langfuse_secret` LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_HOST (also for train.engine megatron without
    train.trackers), `wandb_secret` WANDB_API_KEY, `mlflow_secret` MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME
    and MLFLOW_TRACKING_PASSWORD.
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
    queue: workerspec.LabelledName | None = None
    queue_priority: workerspec.LabelledName | None = None
    topology: TopologySpec | None = None
    priority_class: str | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[TolerationSpec] = []
    queue_timeout_seconds: Count = 86_400
    start_timeout_seconds: Count = 1_800
    run_timeout_seconds: Count = 14 * 86_400
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] = 86_400
    grace_seconds: Count = 120
    env: workerspec.Environment = {}
    labels: workerspec.Labels = {}
    annotations: workerspec.Annotations = {}
    resources: workerspec.Resources = {}
    devices: workerspec.Devices = {}
    ulimits: workerspec.Ulimits = {}
    fabric: Literal["none", FabricName] = "none"
    spread: workerspec.SpreadSpec | None = None
    hub_secret: workerspec.SecretName = workerspec.HUB_SECRET
    judge_secret: workerspec.SecretName = workerspec.JUDGE_SECRET
    langfuse_secret: workerspec.SecretName = workerspec.LANGFUSE_SECRET
    wandb_secret: workerspec.SecretName = workerspec.WANDB_SECRET
    mlflow_secret: workerspec.SecretName = workerspec.MLFLOW_SECRET

    @model_validator(mode="after")
    def _fabric_has_its_devices(self) -> Self:
        if self.fabric != "none":
            asked = [*(name for name in self.resources if "/" in name), *self.devices]  # huge pages are no cards
            if problem := fabric.lacking(self.fabric, self.gpus_per_node, asked, self.annotations):
                raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _has_the_queue_it_needs(self) -> Self:
        for field in ("queue_priority", "topology"):
            if getattr(self, field) is not None and self.queue is None:
                raise ValueError(f"{field} is read by Kueue only for a job in a queue; name one in queue, or remove it")
        return self

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
