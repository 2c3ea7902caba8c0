"""`yaongi run tiny --target kubernetes` in a pod: what the end-to-end tests start, disturb and read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kube import PIPELINE_IMAGE, TRAINER_IMAGE, Namespace, Object, pod

from manifests.names import APP_LABEL, STEP_APP, job_name, kind
from manifests.spec import JobSpec, load_job
from trainer.specbase import changes_from_sets

ACCOUNT = "yaongi-launcher"
STEPS = 40
SETS = [
    f"train.steps={STEPS}",
    "train.batch.tokens_per_step=2048",  # half of the preset's: they take most of the CPU time
    "train.batch.micro_batch_rows=4",
    "train.checkpoint.every_steps=10",
    "train.runtime.log_every_steps=5",
    "train.evaluate.max_tokens=4000",
]
TUNE = (
    "tune={steps: 6, seq_len: 128, batch: {tokens_per_step: 1024, micro_batch_rows: 4}, checkpoint: {every_steps: 6}, "
    "optimizer: {name: adamw, adamw: {learning_rate: 0.002}}, prompts: ['What is 3 + 4?'], sources: {chat: {"
    "licence: Apache-2.0, origin: {kind: files, paths: ['sample://chat.jsonl.gz']}}}}"
)
# Two workers and the test's other pods fit on a node with two CPUs; each rank still has one thread.
ON_CLUSTER = [f"cluster.image={TRAINER_IMAGE}", "cluster.cpus_per_node=0.5", "cluster.memory_gib_per_node=2"]
# What a job may give its workers besides; the node has no RDMA devices.
WORKERS = [
    "cluster.env={TEAM_NOTE: 'two words'}",
    "cluster.labels={team: e2e}",
    "cluster.annotations={example.com/note: 'a, b'}",
    "cluster.spread={required: true}",
]
RUN_TIMEOUT = 1200
TRAIN_STEP = (
    "import sys; from components.launch.step import run; from components.running import step;"
    "from manifests.spec import job_from_json;\n"
    "with step('train'): run(job_from_json(sys.argv[1]), 'train')"
)


@dataclass
class PipelineRun:
    """`yaongi run tiny --target kubernetes` in a separate pod, with the launcher's service account."""

    namespace: Namespace
    pod: str
    job: JobSpec
    code: int = -1
    log: str = ""
    started: float = field(default_factory=time.time)  # Unix seconds, by this machine's clock
    ended: float = math.inf

    @classmethod
    def start(cls, namespace: Namespace, name: str, *changes: str) -> PipelineRun:
        sets = [f"name={name}", *SETS, *ON_CLUSTER, *changes]
        arguments = [part for change in sets for part in ("--set", change)]
        command = ["yaongi", "run", "tiny", "--target", "kubernetes", "--workdir", "/tmp/work", *arguments]
        job = load_job("tiny", changes_from_sets(sets))
        namespace.apply(*driver(name, command))
        return cls(namespace, name, job)

    @classmethod
    def start_training(cls, namespace: Namespace, name: str, *changes: str) -> PipelineRun:
        """Only the launcher's step, as Kubeflow Pipelines runs it: job in, one line out."""
        job = load_job("tiny", changes_from_sets([f"name={name}", *SETS, *ON_CLUSTER, *changes]))
        command = ["python", "-c", TRAIN_STEP, job.model_dump_json()]
        namespace.apply(pod(name, PIPELINE_IMAGE, command, account=ACCOUNT))
        return cls(namespace, name, job)

    def finish(self, *, meanwhile: Callable[[], None] = lambda: None) -> PipelineRun:
        self.code, self.log = self.namespace.exit_of(self.pod, RUN_TIMEOUT, meanwhile=meanwhile)
        self.ended = time.time()
        self.namespace.show(f"after {self.pod}")
        return self

    def read(self, file: str) -> str:
        """A file of the run directory, or "" if there is none."""
        return self.namespace.execute("reader", "cat", f"{self.job.run_dir}/{file}", check=False)

    def read_json(self, file: str) -> Any:
        return json.loads(self.read(file))

    @property
    def since(self) -> str:
        """For PromQL's ranges: the time from the run's start until now."""
        return f"{math.ceil(time.time() - self.started) + 5}s"

    @property
    def losses(self) -> list[float]:
        return losses(self.read("logs/metrics.jsonl"))

    @property
    def condition(self) -> str:
        """The job's last true condition."""
        name = f"metadata.name={job_name(self.job)}"
        (found,) = self.namespace.find(kind(self.job).plural, "--field-selector", name)
        return [c["type"] for c in found["status"]["conditions"] if c["status"] == "True"][-1]

    @cached_property
    def workers(self) -> list[str]:
        return [kind(self.job).worker_name(job_name(self.job), index) for index in range(self.job.cluster.nodes)]


def driver(name: str, command: list[str]) -> list[Object]:
    """A pod that executes steps of the pipeline, labelled as Kubeflow Pipelines would, and its name in DNS."""
    labels = {APP_LABEL: STEP_APP, "app.kubernetes.io/instance": name}
    spec = {"clusterIP": "None", "selector": labels}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}
    return [service, pod(name, PIPELINE_IMAGE, command, account=ACCOUNT, labels=labels)]


def losses(metrics_jsonl: str) -> list[float]:
    """Loss by step; the file contains each step once and in order."""
    lines = [json.loads(line) for line in metrics_jsonl.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
