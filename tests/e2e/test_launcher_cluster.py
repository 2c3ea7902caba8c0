"""The launcher with a real cluster, with its service account and in a restricted namespace.

The workers run shell scripts instead of the trainer; everything else is rendered by `manifests`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3
from cuttable import Relay, relay
from kube import Namespace, wait_for
from kubernetes import client
from launching import (
    ALONE,
    Gate,
    Launcher,
    as_account,
    assert_gone,
    both_pods_of,
    jobs_of,
    pods_of,
    read_until,
    scripted,
    start_process,
    tiny,
)

from components.cluster.api import Cluster
from components.launch.follow import JobFailed
from components.launch.kubernetes import launch
from manifests.kinds import pod_template
from manifests.render import job_objects
from trainer.errors import LaunchError

pytestmark = pytest.mark.e2e


def test_two_workers_succeed_and_each_line_of_worker_0_is_shown_once(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace)
    lines = 'for i in 1 2 3; do echo "worker $index line $i"; sleep 1; done; cat /etc/yaongi/train.yaml; sleep 1; '
    launcher(job, lines + ALONE)
    assert [launcher.count(f"worker 0 line {i}") for i in (1, 2, 3)] == [1, 1, 1]
    assert not launcher.has("worker 1 line")
    assert launcher.count(f"run: {job.run_name}") == 1, "the spec is mounted where the trainer looks for it"
    owners = json.loads(namespace.kubectl("get", "configmap", job.run_name, "-o", "json"))["metadata"][
        "ownerReferences"
    ]
    assert [(owner["kind"], owner["name"]) for owner in owners] == [("PyTorchJob", job.run_name)]


def test_a_failure_names_worker_node_code_and_reason(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace)
    script = (
        'if [ "$index" = 1 ]; then sleep 2; echo "about to give up"; '
        'echo "steps: must be positive" > /dev/termination-log; exit 2; fi; sleep 600'
    )
    with pytest.raises(JobFailed) as caught:
        launcher(job, script)
    message = str(caught.value)
    node = namespace.find("nodes")[0]["metadata"]["name"]
    assert f"{job.run_name}-worker-1 on node {node} exited 2 (bad spec): steps: must be positive" in message
    assert "about to give up" in message
    assert "\n" not in message
    running = [p for p in pods_of(namespace, job) if p["status"]["phase"] == "Running"]
    wait_for("the other worker to end", lambda: not [p for p in running if p in pods_of(namespace, job)], 120)

    launcher.lines.clear()
    launcher(job, ALONE + "echo second attempt")
    assert launcher.has("deleting the finished job")
    assert launcher.count("second attempt") == 1


def test_a_retryable_exit_is_told_and_the_new_pod_followed(volumes: Namespace, launcher: Launcher) -> None:
    job = tiny(volumes, cluster={"nodes": 1})
    flag, shown = f"/mnt/checkpoints/{job.run_name}", Gate(volumes)
    launcher.acts["first"] = shown.open  # the pod is removed with its log as soon as it has failed
    launcher(job, f"if [ -e {flag} ]; then echo again; else touch {flag}; echo first; {shown.wait}; exit 160; fi")
    assert (launcher.count("first"), launcher.count("again")) == (1, 1)
    assert launcher.has("exited 160 (communication with another rank failed)")
    assert launcher.has("(1 restarts)")


def test_an_absent_image_is_named_soon_and_the_job_removed(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace, cluster={"start_timeout_seconds": 600})
    begun = time.monotonic()
    with pytest.raises(LaunchError, match=r"image 'localhost/absent:1' cannot be pulled .* check cluster\.image"):
        launcher(job, "true", image="localhost/absent:1")
    assert time.monotonic() - begun < 120
    assert_gone(namespace, job)


def test_an_absent_claim_is_named_before_anything_is_created(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace, storage={"datasets_pvc": "nowhere"})
    with pytest.raises(LaunchError, match="volume claim 'nowhere' does not exist in namespace"):
        launcher(job, "true")
    assert not jobs_of(namespace, job)


def test_a_cluster_without_pytorchjob_is_told(namespace: Namespace) -> None:
    """The real answer for a missing resource, since there is no cluster without the operator."""
    cluster = Cluster.connect(namespace.name)
    get = cluster.custom.get_namespaced_custom_object
    with pytest.raises(LaunchError, match=r"knows no PyTorchJob .* install the Kubeflow training operator"):
        cluster.call("get pytorchjobs", get, "kubeflow.org", "v1", namespace.name, "absentjobs", "x")


def test_an_absent_namespace_is_told(namespace: Namespace) -> None:
    cluster = Cluster.connect("no-such-namespace")
    job = tiny(namespace, cluster={"namespace": "no-such-namespace"})
    with pytest.raises(LaunchError, match="namespace 'no-such-namespace' does not exist"):
        cluster.create(job_objects(job)[-1])


def test_an_unreachable_api_is_told(namespace: Namespace) -> None:
    def elsewhere(settings: client.Configuration) -> None:
        settings.host = "https://127.0.0.1:1"

    launcher = Launcher(as_account(namespace, "yaongi-launcher", elsewhere))
    with pytest.raises(LaunchError, match=r"API server https://127\.0\.0\.1:1 cannot be reached"):
        launcher(tiny(namespace), "true")


def test_an_unschedulable_job_says_why_and_is_removed(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace, cluster={"cpus_per_node": 5000, "queue_timeout_seconds": 60})
    with pytest.raises(
        LaunchError, match=r"waited \d+ s for nodes .*worker-0: cannot be scheduled: .*Insufficient cpu"
    ):
        launcher(job, "true")
    assert not jobs_of(namespace, job)


def test_a_spent_quota_is_told(namespace: Namespace, launcher: Launcher) -> None:
    hard = {"requests.cpu": "10m"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "narrow"}, "spec": {"hard": hard}}
    namespace.apply(quota)
    try:
        job = tiny(namespace, cluster={"queue_timeout_seconds": 60})
        wait_for("the quota", lambda: namespace.find("resourcequotas")[0].get("status", {}).get("hard"), 120)
        with pytest.raises(LaunchError, match=r"waited \d+ s for nodes .*exceeded quota: narrow"):
            launcher(job, "true")
    finally:
        namespace.kubectl("delete", "resourcequota", "narrow")


def test_pod_security_that_rejects_the_workers_is_told_at_once(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace)
    rendered = scripted(job, "true")
    pod_template(rendered)["spec"]["hostNetwork"] = True
    with pytest.raises(LaunchError, match=r"cannot start: a worker cannot be created: .*violates PodSecurity"):
        launch(launcher.cluster, rendered, job.cluster, launcher.write)


def test_a_killed_launcher_is_replaced_by_a_new_one(
    volumes: Namespace, launcher: Launcher, processes: list[subprocess.Popen[str]]
) -> None:
    job, adopted = tiny(volumes), Gate(volumes)
    script = f"echo begun; {ALONE}{adopted.wait}; echo done"
    process = start_process(volumes, job, script, processes)
    read_until(process, "begun")
    process.kill()
    before = both_pods_of(volumes, job)
    launcher.acts["is there already; following it"] = adopted.open
    launcher(job, script)
    assert not launcher.acts, "the second launcher found the job running"
    assert launcher.count("done") == 1
    after = {p["metadata"]["uid"] for p in pods_of(volumes, job)}
    assert after <= before, "the workers were not started again"


def test_a_running_job_with_other_settings_is_left_alone(
    namespace: Namespace, launcher: Launcher, processes: list[subprocess.Popen[str]]
) -> None:
    job = tiny(namespace)
    process = start_process(namespace, job, "echo begun; sleep 600", processes)
    read_until(process, "begun")
    other = job.updated({"cluster": {"nodes": 1}})
    assert other.run_name == job.run_name
    with pytest.raises(LaunchError, match=r"is already running in namespace .* with other settings"):
        launcher(other, "true")
    assert jobs_of(namespace, job)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) != 0
    assert not jobs_of(namespace, job)


def test_a_job_deleted_by_somebody_else_is_told(namespace: Namespace, processes: list[subprocess.Popen[str]]) -> None:
    job = tiny(namespace)
    process = start_process(namespace, job, "echo up; sleep 600", processes)
    read_until(process, "up")
    namespace.kubectl("delete", "pytorchjob", job.run_name)
    read_until(process, f"job {job.run_name} was deleted in namespace '{namespace.name}' by someone else")
    assert process.wait(timeout=300) == 1


@contextmanager
def behind_relay(namespace: Namespace) -> Iterator[tuple[Launcher, Relay]]:
    """A launcher whose connection to the API server can be cut."""
    server = urlsplit(Cluster.connect(namespace.name).server)
    with relay(server.hostname, server.port) as way:

        def through(settings: client.Configuration) -> None:
            settings.host = f"https://127.0.0.1:{way.port}"
            settings.tls_server_name = server.hostname

        yield Launcher(as_account(namespace, "yaongi-launcher", through)), way


def test_an_api_outage_neither_ends_the_run_nor_repeats_its_log(volumes: Namespace) -> None:
    job, noticed = tiny(volumes, cluster={"nodes": 1}), Gate(volumes)
    with behind_relay(volumes) as (launcher, way):

        def mend() -> None:
            way.mend()
            noticed.open()

        launcher.acts |= {"line 3": way.cut, "does not answer; trying again": mend}
        lasting = f"[ $i -lt 9 ] || {noticed.wait}"  # until the outage has been noticed
        launcher(job, f'i=0; while [ $i -lt 12 ]; do i=$((i+1)); echo "line $i"; sleep 1; {lasting}; done')
    assert not launcher.acts, "there was an outage, which was noticed"
    assert [launcher.count(f"line {i}") for i in range(1, 13)] == [1] * 12


def test_an_outage_at_the_start_is_waited_for_and_a_lost_answer_makes_no_second_job(namespace: Namespace) -> None:
    job = tiny(namespace, cluster={"nodes": 1})
    with behind_relay(namespace) as (launcher, way):
        create = launcher.cluster.custom.create_namespaced_custom_object
        created: list[str] = []
        lost: set[str] = set()

        def answer_lost(**arguments: Any) -> Any:
            """The first answer for each kind of object."""
            made = create(**arguments)
            created.extend([made["metadata"]["uid"]] if made["kind"] == "PyTorchJob" else [])
            if made["kind"] in lost:
                return made
            lost.add(made["kind"])
            raise urllib3.exceptions.ProtocolError("connection aborted")

        launcher.cluster.custom.create_namespaced_custom_object = answer_lost
        way.cut()
        threading.Timer(2, way.mend).start()
        launcher(job, "echo worked; sleep 1")
    assert launcher.count("worked") == 1
    assert [found["metadata"]["uid"] for found in jobs_of(namespace, job)] == created
