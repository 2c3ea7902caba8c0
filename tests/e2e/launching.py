"""Jobs whose workers run shell scripts in place of the trainer, all else as `manifests` renders it; their launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kube import Namespace
from kubernetes import client, config

from components.launch.kubernetes import launch
from components.launch.kubernetes_api import Cluster
from manifests.kinds import KINDS, Object, pod_template
from manifests.names import PIPELINE_LABEL
from manifests.render import job_objects
from manifests.spec import JobSpec, job_from

HERE = Path(__file__).parent
BUSYBOX = os.environ.get("YAONGI_BUSYBOX_IMAGE", "localhost/busybox:1.35")
WORKER = 'index="${HOSTNAME##*-}"; '
SMALL = {"nodes": 2, "cpus_per_node": 0.05, "memory_gib_per_node": 0.0625, "shared_memory_gib": 0.03125}
SHORT = {"grace_seconds": 3, "queue_timeout_seconds": 60, "start_timeout_seconds": 60, "run_timeout_seconds": 120}


def tiny(namespace: Namespace, **changes: Any) -> JobSpec:
    """A job of a name of its own, too small to wait for room on a node."""
    cluster = {**SMALL, **SHORT, "namespace": namespace.name, **changes.pop("cluster", {})}
    return job_from({"preset": "tiny", "name": f"t{uuid.uuid4().hex[:6]}"}, {"cluster": cluster, **changes})


def scripted(job: JobSpec, script: str, image: str = BUSYBOX, pipeline_run: str = "") -> list[Object]:
    """The job's objects as rendered, with a shell script in place of the trainer."""
    rendered = job_objects(job)
    if pipeline_run:
        rendered[-1]["metadata"]["labels"][PIPELINE_LABEL] = pipeline_run
    (container,) = pod_template(rendered)["spec"]["containers"]
    del container["args"]
    container.update(image=image, command=["sh", "-c", WORKER + script])
    return rendered


class Launcher:
    """Launches and keeps the lines written."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.lines: list[str] = []

    def __call__(self, job: JobSpec, script: str, image: str = BUSYBOX) -> None:
        launch(self.cluster, scripted(job, script, image), job.cluster, self.write)

    def write(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def count(self, text: str) -> int:
        return sum(text == line for line in self.lines)

    def has(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def as_account(
    namespace: Namespace, account: str, change: Callable[[client.Configuration], None] | None = None
) -> Cluster:
    """The cluster as one of the namespace's service accounts sees it."""
    settings = client.Configuration()
    config.load_kube_config(client_configuration=settings)
    settings.cert_file = settings.key_file = None
    token = namespace.kubectl("create", "token", account, "--duration=3600s").strip()
    settings.api_key = {"authorization": f"Bearer {token}"}
    settings.retries = 0
    if change:
        change(settings)
    return Cluster(client.ApiClient(settings), namespace.name)


def process_arguments(job: JobSpec, script: str, namespace: str | None, pipeline_run: str = "") -> str:
    """What launcher_process.py takes; without a namespace it looks for its own."""
    objects, limits = scripted(job, script, pipeline_run=pipeline_run), job.cluster.model_dump(mode="json")
    return json.dumps({"namespace": namespace, "objects": objects, "limits": limits})


def start_process(
    namespace: Namespace, job: JobSpec, script: str, processes: list[subprocess.Popen[str]], pipeline_run: str = ""
) -> subprocess.Popen[str]:
    """A launcher in its own process, as the cluster's administrator."""
    arguments = process_arguments(job, script, namespace.name, pipeline_run)
    command = [sys.executable, str(HERE / "launcher_process.py"), arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes.append(process)
    return process


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Let the launcher run until it has said `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if text in line:
            return
    raise AssertionError(f"the launcher ended without {text!r}")


def pods_of(namespace: Namespace, job: JobSpec) -> list[Object]:
    return namespace.find("pods", "-l", KINDS[job.cluster.job].selector(job.run_name))


def running_pods_of(namespace: Namespace, job: JobSpec) -> list[str]:
    """Those that have not ended: a pod object that is left to be looked at holds nothing."""
    pods = pods_of(namespace, job)
    return [found["metadata"]["name"] for found in pods if found["status"]["phase"] not in ("Succeeded", "Failed")]


def jobs_of(namespace: Namespace, job: JobSpec) -> list[Object]:
    return namespace.find(KINDS[job.cluster.job].plural, "--field-selector", f"metadata.name={job.run_name}")
