"""TrainJobs: the launcher reports the state of a gang correctly, and trains as with a PyTorchJob."""

from __future__ import annotations

import subprocess
from threading import Thread

import pytest
from kube import Namespace, wait_for
from launching import (
    Gate,
    Launcher,
    assert_gone,
    both_pods_of,
    pods_of,
    read_until,
    running_pods_of,
    scripted,
    start_process,
    tiny,
)
from pipeline_run import PipelineRun

from components.diagnose.gather import situation
from components.diagnose.why import why
from components.launch.follow import JobFailed
from components.launch.kubernetes import launch
from manifests.names import job_name
from manifests.spec import JobSpec
from trainer.errors import LaunchError

pytestmark = pytest.mark.e2e

GANG = {"job": "trainjob"}


def needs_of(namespace: Namespace, job: JobSpec) -> list[str]:
    """The objects that were created for the job and are deleted with it."""
    name = f"metadata.name={job.run_name}"
    found = namespace.find("trainingruntimes,jobsets,configmaps,networkpolicies", "--field-selector", name)
    return sorted(item["kind"] for item in found)


def test_two_workers_succeed_and_take_all_they_needed_along(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace, cluster=GANG)
    launcher(job, 'env | grep ^PET_ | sort; echo "worker $index"; cat /etc/yaongi/train.yaml; sleep 2')
    name = job.run_name
    assert launcher.count("worker 0") == 1 and not launcher.has("worker 1")
    assert launcher.count(f"run: {name}") == 1, "the spec is mounted where the trainer looks for it"
    given = dict(line.split("=", 1) for line in launcher.lines if line.startswith("PET_"))
    assert given == {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": "29500",
        "PET_RDZV_CONF": f"timeout={job.cluster.start_timeout_seconds}",
    }
    assert launcher.has(f"job {name} succeeded (0 restarts)")
    assert needs_of(namespace, job) == ["ConfigMap", "JobSet", "NetworkPolicy", "TrainingRuntime"]
    namespace.kubectl("delete", "trainjob", name)
    wait_for("all of it to be collected", lambda: not needs_of(namespace, job) and not pods_of(namespace, job), 180)


def test_a_permanent_failure_names_pod_node_code_and_reason_and_can_be_run_again(
    namespace: Namespace, launcher: Launcher
) -> None:
    job = tiny(namespace, cluster=GANG)
    script = (
        'if [ "$index" = 1 ]; then sleep 2; echo "about to give up"; '
        'echo "steps: must be positive" > /dev/termination-log; exit 2; fi; trap "exit 143" TERM; sleep 600 & wait'
    )
    with pytest.raises(JobFailed) as caught:
        launcher(job, script)
    message = str(caught.value)
    node = namespace.find("nodes")[0]["metadata"]["name"]
    assert f"{job.run_name}-node-0-1-" in message and f" on node {node} exited 2 (bad spec): steps: must" in message
    assert "about to give up" in message and "\n" not in message
    wait_for(
        "the other worker to end",
        lambda: not [p for p in pods_of(namespace, job) if p["status"]["phase"] == "Running"],
        120,
    )

    launcher.lines.clear()
    launcher(job, "echo second attempt")
    assert launcher.has("deleting the finished job")
    assert launcher.count("second attempt") == 1


def test_a_retryable_exit_restarts_all_workers_once(volumes: Namespace, launcher: Launcher) -> None:
    job = tiny(volumes, cluster=GANG)
    flag, shown = f"/mnt/checkpoints/{job.run_name}", Gate(volumes)
    launcher.acts["worker 0 first"] = shown.open  # its pod is removed with its log as soon as the other one has failed
    script = (
        f'if [ -e {flag}-$index ]; then echo "worker $index again"; exit 0; fi; touch {flag}-$index; '
        f'echo "worker $index first"; if [ "$index" = 1 ]; then {shown.wait}; exit 160; fi; '
        'trap "exit 143" TERM; sleep 600 & wait'
    )
    launcher(job, script)
    assert (launcher.count("worker 0 first"), launcher.count("worker 0 again")) == (1, 1)
    assert launcher.has("exited 160 (communication with another rank failed)")
    assert not launcher.has("removed from outside")
    assert launcher.has("(1 restarts)")


def test_an_unschedulable_gang_says_why_and_is_removed(namespace: Namespace, launcher: Launcher) -> None:
    job = tiny(namespace, cluster={**GANG, "cpus_per_node": 5000, "queue_timeout_seconds": 60})
    with pytest.raises(LaunchError, match=r"waited \d+ s for nodes .*node-0-0: cannot be scheduled: .*Insufficient"):
        launcher(job, "true")
    assert_gone(namespace, job)


def test_a_spent_quota_is_told(namespace: Namespace, launcher: Launcher) -> None:
    hard = {"requests.cpu": "10m"}
    namespace.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gang"}, "spec": {"hard": hard}})
    try:
        job = tiny(namespace, cluster={**GANG, "queue_timeout_seconds": 60})
        wait_for("the quota", lambda: namespace.find("resourcequotas")[0].get("status", {}).get("hard"), 120)
        with pytest.raises(LaunchError, match=r"waited \d+ s for nodes .*exceeded quota: gang"):
            launcher(job, "true")
        told = [line for line in launcher.lines if "exceeded quota: gang" in line]
        assert len(told) == 1 and f'pods "{job.run_name}-node-0-0" is forbidden' in told[0], told
    finally:
        namespace.kubectl("delete", "resourcequota", "gang")


def test_a_deadline_of_the_job_itself_ends_it_and_is_told(namespace: Namespace, launcher: Launcher) -> None:
    """Seen by the launcher though its own clock has time left, and the operator has deleted pods and logs."""
    job = tiny(
        namespace, cluster={**GANG, "queue_timeout_seconds": 5, "start_timeout_seconds": 5, "run_timeout_seconds": 5}
    )
    patient = job.model_copy(update={"cluster": tiny(namespace, cluster=GANG).cluster})
    script = 'trap "echo saving; exit 143" TERM; sleep 600 & wait'
    with pytest.raises(JobFailed) as caught:
        launch(launcher.cluster, scripted(job, script), patient.cluster, launcher.write)
    if namespace.trainer() != "2.1":
        assert "failed: TrainJob exceeded its active deadline" in str(caught.value)
        assert "cluster.run_timeout_seconds" in str(caught.value)
        assert str(why(situation(launcher.cluster, job.run_name))).startswith("failed: its activeDeadlineSeconds have")
    wait_for("its pods to end", lambda: not running_pods_of(namespace, job), 180)


def test_a_job_that_is_suspended_and_resumed_is_not_given_up(volumes: Namespace, launcher: Launcher) -> None:
    """As a queue does; Trainer 2.3 then reports an error in passing, which is none."""
    job, resumed = tiny(volumes, cluster=GANG), Gate(volumes)
    name = job.run_name

    def suspend_and_resume() -> None:
        for suspend in ("true", "false"):
            volumes.kubectl("patch", "trainjob", name, "--type=merge", "-p", f'{{"spec": {{"suspend": {suspend}}}}}')
            gone = suspend == "true"
            wait_for("its pods", lambda gone=gone: bool(running_pods_of(volumes, job)) is not gone, 180)
        resumed.open()

    launcher.acts["begun"] = lambda: Thread(target=suspend_and_resume, daemon=True).start()
    launcher(job, f'echo begun; trap "exit 143" TERM; [ "$index" = 1 ] || {{ {resumed.wait}; }} & wait')
    assert launcher.count("begun") == 2
    assert not launcher.has("Invalid value") and not launcher.has("cannot be created")


def test_a_killed_launcher_is_replaced_and_the_new_one_stops_the_job(
    namespace: Namespace, processes: list[subprocess.Popen[str]]
) -> None:
    job = tiny(namespace, cluster=GANG)
    script = 'echo begun; trap "exit 143" TERM; sleep 600 & wait'
    first = start_process(namespace, job, script, processes)
    read_until(first, "begun")
    first.kill()
    before = both_pods_of(namespace, job)
    second = start_process(namespace, job, script, processes)
    read_until(second, "is there already; following it")
    read_until(second, "begun")
    assert {pod["metadata"]["uid"] for pod in pods_of(namespace, job)} == before, "the workers were started again"
    second.terminate()
    assert second.wait(timeout=300) == 143
    assert_gone(namespace, job)


def test_the_real_trainer_ends_with_the_same_losses_as_under_a_pytorchjob(first: PipelineRun) -> None:
    """`first` is compared with the same job on one machine elsewhere."""
    assert first.code == 0, first.log
    run = PipelineRun.start(first.namespace, "gang", "cluster.job=trainjob").finish()
    assert run.code == 0, run.log
    assert run.condition == "Complete"
    assert run.losses == first.losses
    result = run.read_json("result.json")
    assert (result["world_size"], result["steps"]) == (2, len(first.losses))
    program = "from trainer.checkpoints.checkpoint import latest, verify; print(verify(latest(sys.argv[1])).digest)"
    digest = run.namespace.execute("reader", "python", "-c", f"import sys; {program}", run.job.run_dir).strip()
    assert digest == result["checkpoint_digest"]
    status = (run.namespace.get("trainjob", job_name(run.job)) or {})["status"].get("trainerStatus", {})
    print(f"the TrainJob's own status shows {status}")
    if run.namespace.shows_progress():
        shown = {metric["name"]: float(metric["value"]) for metric in status["metrics"]}
        assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (100, 0)
        assert shown["step"] == len(run.losses) and shown["loss"] == pytest.approx(run.losses[-1], rel=1e-5)
    else:
        assert not status


def test_a_diverging_trainjob_ends_red_and_says_why(first: PipelineRun) -> None:
    changes = ["train.optimizer.clip_norm=null", "train.optimizer.muon.learning_rate=1.0e+30"]
    run = PipelineRun.start(first.namespace, "gang-diverging", "cluster.job=trainjob", *changes).finish()
    assert run.code not in (0, -1)
    last = [line for line in run.log.splitlines() if "error:" in line][-1]
    assert "-node-0-" in last and "exited 70 (training diverged)" in last, last
    assert not [p for p in pods_of(run.namespace, run.job) if p["status"]["phase"] == "Running"]
