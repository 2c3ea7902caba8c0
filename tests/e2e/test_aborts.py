"""A minute after a launch ends in any way, none of its workers runs. Each test prints how long it took.

Most workers here are shell scripts; in tests where only the trainer can act, it is the real trainer.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kube import PIPELINE_IMAGE, Namespace, Object, pod, wait_for
from launching import (
    Launcher,
    as_account,
    assert_gone,
    both_pods_of,
    jobs_of,
    process_arguments,
    read_until,
    running_pods_of,
    start_process,
    tiny,
)
from pipeline_run import RUN_TIMEOUT, PipelineRun

from components.cleanup.step import cleanup
from manifests.kinds import KINDS
from manifests.names import PIPELINE_LABEL, job_name
from manifests.spec import JobSpec

pytestmark = pytest.mark.e2e

LAUNCHER = (Path(__file__).parent / "launcher_process.py").read_text()
SECONDS = 60
WORKER = 'echo up; trap "exit 143" TERM; sleep 300 & wait'
BOTH_KINDS = pytest.mark.parametrize("kind", KINDS)
# The running step, in a pod without ps: a fork of a fork of the process that executes the pipeline.
KILL_STEP = """
import os, pathlib
parents = {}
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if b"pipelines.execute\\0" in (folder / "cmdline").read_bytes():
            parents[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:  # it has ended meanwhile
        continue
(step,) = (pid for pid, parent in parents.items() if parent in parents and parents[parent] in parents)
os.kill(int(step), 9)
"""


def gone_within_a_minute(route: str, running: Callable[[], object]) -> None:
    """Wait until nothing runs, and print how long that took."""
    begun = time.monotonic()
    wait_for(f"every worker to end after {route}", lambda: not running(), SECONDS, every=0.5)
    print(f"{route}: no worker left after {time.monotonic() - begun:.1f} s", flush=True)


def in_a_pod(namespace: Namespace, name: str, job: JobSpec, owners: list[Object] | None = None) -> Object:
    """A launcher in a separate pod, like a step of Kubeflow Pipelines; returns the job when all its workers run."""
    command = ["python", "-c", LAUNCHER, process_arguments(job, WORKER, None)]
    body = pod(name, PIPELINE_IMAGE, command, account="yaongi-launcher", mounts={})
    body["metadata"]["ownerReferences"] = owners or []
    namespace.apply(body)
    wait_for("both workers", lambda: len(running_pods_of(namespace, job)) == 2, 300)
    (found,) = jobs_of(namespace, job)
    (owner,) = found["metadata"]["ownerReferences"]
    launcher = namespace.get("pod", name)
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Pod", name, launcher["metadata"]["uid"])
    return found


@BOTH_KINDS
def test_sigterm(namespace: Namespace, processes: list[subprocess.Popen[str]], kind: str) -> None:
    job = tiny(namespace, cluster={"job": kind})
    process = start_process(namespace, job, WORKER, processes)
    read_until(process, "up")
    process.send_signal(signal.SIGTERM)
    gone_within_a_minute(f"SIGTERM ({kind})", lambda: running_pods_of(namespace, job))
    assert process.wait(timeout=300) == 143
    assert not jobs_of(namespace, job)


@BOTH_KINDS
def test_the_launchers_own_deadline(namespace: Namespace, processes: list[subprocess.Popen[str]], kind: str) -> None:
    job = tiny(namespace, cluster={"run_timeout_seconds": 4, "job": kind})
    process = start_process(namespace, job, WORKER, processes)
    read_until(process, "launcher: deleting job")
    gone_within_a_minute(f"the deadline ({kind})", lambda: running_pods_of(namespace, job))
    read_until(process, "ran longer than cluster.run_timeout_seconds = 4")
    assert process.wait(timeout=300) == 1
    assert not jobs_of(namespace, job)


@BOTH_KINDS
def test_the_launchers_pod_is_deleted(namespace: Namespace, kind: str) -> None:
    job = tiny(namespace, cluster={"job": kind})
    in_a_pod(namespace, f"owner-{kind}", job)
    namespace.kubectl("delete", "pod", f"owner-{kind}", "--grace-period=0", "--force")
    gone_within_a_minute(f"the end of the launcher's pod ({kind})", lambda: running_pods_of(namespace, job))
    wait_for("the job to be collected", lambda: not jobs_of(namespace, job), 120)


def test_the_run_is_deleted(namespace: Namespace) -> None:
    """As in Kubeflow Pipelines: the run's object owns the step's pod, which owns the job."""
    job = tiny(namespace)
    namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "workflow"}})
    uid = namespace.get("configmap", "workflow")["metadata"]["uid"]
    in_a_pod(namespace, "step", job, [{"apiVersion": "v1", "kind": "ConfigMap", "name": "workflow", "uid": uid}])
    namespace.kubectl("delete", "configmap", "workflow")
    gone_within_a_minute("the end of the run", lambda: running_pods_of(namespace, job))
    wait_for("the job to be collected", lambda: not jobs_of(namespace, job), 120)
    wait_for("the step to be collected", lambda: not namespace.get("pod", "step"), 180)


def test_a_killed_launcher_whose_pod_stays_leaves_no_worker_and_a_checkpoint(volumes: Namespace) -> None:
    """What Terminate does to a step: no signal is sent; the pod object, which owns the job, and the lease remain."""
    run = PipelineRun.start(volumes, "orphan", "train.steps=1000", "train.checkpoint.every_steps=1000")
    wait_for("step 3", lambda: len(run.read("logs/metrics.jsonl").splitlines()) >= 3, RUN_TIMEOUT, every=0.5)
    assert len(running_pods_of_run(run)) == 2 and not run.read("checkpoints/LATEST")
    volumes.execute("orphan", "sh", "-c", "kill -9 -1", check=False)
    gone_within_a_minute("kill -9", lambda: running_pods_of_run(run))
    volumes.show("after kill -9 of the launcher")
    assert run.finish().code == 137, "the launcher's pod is still there"
    wait_for("the job to be known as failed", lambda: run.condition == "Failed", 120)

    def removed() -> list[Object]:
        """The operator removes running workers when the job has failed; their exit codes do not matter."""
        return [found for found in pods_of_run(run) if "deletionTimestamp" in found["metadata"]]

    wait_for("pods that are being removed to go", lambda: not removed(), 120)
    left = pods_of_run(run)
    assert left
    for worker in left:
        (status,) = worker["status"]["containerStatuses"]
        assert status["state"]["terminated"]["exitCode"] == 75
        assert "has not renewed its lease" in status["state"]["terminated"]["message"]
    step = int(run.read("checkpoints/LATEST").strip().removeprefix("step-"))
    assert step == len(run.read("logs/metrics.jsonl").splitlines()) >= 3, "the step it stopped at is saved"


def pods_of_run(run: PipelineRun) -> list[Object]:
    return run.namespace.find("pods", "-l", KINDS[run.job.cluster.job].selector(job_name(run.job)))


def running_pods_of_run(run: PipelineRun) -> list[Object]:
    return [found for found in pods_of_run(run) if found["status"]["phase"] not in ("Succeeded", "Failed")]


def test_the_exit_handler_removes_what_a_killed_step_left_pending(volumes: Namespace) -> None:
    """Workers that wait for a node do not read the lease."""
    run = PipelineRun.start(volumes, "handled", "cluster.node_selector.absent=node")
    wait_for("both workers", lambda: len(running_pods_of_run(run)) == 2, RUN_TIMEOUT, every=0.5)
    volumes.execute("handled", "python", "-c", KILL_STEP)
    gone_within_a_minute("the kill -9 of a step", lambda: running_pods_of_run(run))
    run.finish()
    assert run.code not in (0, -1)
    assert f"deleted job {job_name(run.job)}" in run.log and "no worker runs any more" in run.log
    (told,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: train: "), "the cleanup is not what failed"


@BOTH_KINDS
def test_the_exit_handler_takes_its_own_jobs_and_not_those_that_another_run_has_adopted(
    namespace: Namespace, processes: list[subprocess.Popen[str]], kind: str
) -> None:
    job = tiny(namespace, cluster={"job": kind})
    first = start_process(namespace, job, WORKER, processes, "run-1")
    read_until(first, "up")
    both_pods_of(namespace, job)
    first.kill()
    account = Launcher(as_account(namespace, "yaongi-launcher"))
    (listed,) = account.cluster.jobs(KINDS[job.cluster.job], f"{PIPELINE_LABEL}=run-1")
    second = start_process(namespace, job, WORKER, processes, "run-2")
    read_until(second, "is there already; following it")

    assert not account.cluster.delete_unchanged(listed), "it was adopted between listing and deletion"
    cleanup(account.cluster, "run-1", job.cluster, account.write)
    assert account.lines == ["this run left no job running"]
    (adopted,) = jobs_of(namespace, job)
    assert adopted["metadata"]["labels"][PIPELINE_LABEL] == "run-2"
    assert len(running_pods_of(namespace, job)) == 2

    second.kill()
    begun = time.monotonic()
    cleanup(account.cluster, "run-2", job.cluster, account.write)
    print(f"exit handler ({kind}): no worker left after {time.monotonic() - begun:.1f} s")
    assert account.has(f"deleted job {job.run_name}") and account.has("no worker runs any more")
    assert_gone(namespace, job)
