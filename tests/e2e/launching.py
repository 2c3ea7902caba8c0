"""Jobs as rendered by `manifests`, but whose workers run shell scripts instead of the trainer; their launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kube import Namespace, wait_for
from kubernetes import client, config

from components.cluster.api import Cluster
from components.launch.kubernetes import launch
from manifests.kinds import KINDS, Object, pod_template
from manifests.names import PIPELINE_LABEL
from manifests.render import job_objects
from manifests.spec import JobSpec, job_from

HERE = Path(__file__).parent
BUSYBOX = os.environ.get("YAONGI_BUSYBOX_IMAGE", "localhost/busybox:1.35")
WORKER = 'index="${HOSTNAME##*-}"; '
SMALL = {"nodes": 2, "cpus_per_node": 0.05, "memory_gib_per_node": 0.0625, "shared_memory_gib": 0.03125}
# Time limits are reached only by tests about them, which set their own.
SHORT = {"grace_seconds": 3, "queue_timeout_seconds": 300, "start_timeout_seconds": 300, "run_timeout_seconds": 600}
# An elastic PyTorchJob has succeeded as soon as any worker has, and the operator then removes running workers. If a
# test needs a line of worker 0, the others therefore run until they are removed.
ALONE = '[ "$index" = 0 ] || sleep 600; '


def tiny(namespace: Namespace, **changes: Any) -> JobSpec:
    """A job with a unique name, small enough to fit on a node immediately."""
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


def granted(namespace: Namespace, user: str, verb: str = "create", resource: str = "pytorchjobs") -> None:
    """Wait until the API server applies permissions that were created just before."""
    question = ("auth", "can-i", verb, resource, "--as", user)
    wait_for(f"{user} to be allowed", lambda: namespace.kubectl(*question, check=False).strip() == "yes", 180)


class Gate:
    """A file on the checkpoints volume for which workers' scripts wait, so that they run until a test has seen them.

    Args:
        volumes: with a pod named `reader`, which has the volume, too.
    """

    def __init__(self, volumes: Namespace) -> None:
        self.volumes, self.file = volumes, f"/mnt/checkpoints/gate-{uuid.uuid4().hex[:6]}"
        self.wait = f"until [ -e {self.file} ]; do sleep 0.2; done"  # for scripts

    def open(self) -> None:
        touch = ("sh", "-c", f"touch {self.file} && echo open")
        wait_for("the gate to open", lambda: self.volumes.execute("reader", *touch, check=False), 60)


class Launcher:
    """Launches, and keeps the lines that are written."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.lines: list[str] = []
        self.acts: dict[str, Callable[[], object]] = {}  # what to do when a line with this text is first written

    def __call__(self, job: JobSpec, script: str, image: str = BUSYBOX) -> None:
        launch(self.cluster, scripted(job, script, image), job.cluster, self.write)

    def write(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        for text in [text for text in list(self.acts) if text in line]:
            self.acts.pop(text, lambda: None)()

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
    """Let the launcher run until it has printed `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if text in line:
            return
    raise AssertionError(f"the launcher ended without {text!r}")


def pods_of(namespace: Namespace, job: JobSpec) -> list[Object]:
    return namespace.find("pods", "-l", KINDS[job.cluster.job].selector(job.run_name))


def assert_gone(namespace: Namespace, job: JobSpec) -> None:
    """The job and its pods; a pod that an operator made from an old copy of the job may be collected a little later."""
    assert not jobs_of(namespace, job)
    wait_for("a pod of a job that is gone to be collected", lambda: not pods_of(namespace, job), 180)


def running_pods_of(namespace: Namespace, job: JobSpec) -> list[str]:
    """The pods that have not ended; finished pod objects hold no resources."""
    pods = pods_of(namespace, job)
    return [found["metadata"]["name"] for found in pods if found["status"]["phase"] not in ("Succeeded", "Failed")]


def both_pods_of(namespace: Namespace, job: JobSpec) -> set[str]:
    """UIDs of both workers' pods; the second pod may be created when the first already runs."""
    pods = wait_for("both workers' pods", lambda: pods_of(namespace, job), 120, is_there=lambda found: len(found) == 2)
    return {found["metadata"]["uid"] for found in pods}


def jobs_of(namespace: Namespace, job: JobSpec) -> list[Object]:
    return namespace.find(KINDS[job.cluster.job].plural, "--field-selector", f"metadata.name={job.run_name}")
