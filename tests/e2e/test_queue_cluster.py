"""Jobs in a queue of Kueue: they wait, are admitted, lose their place to a higher class and go on from a checkpoint.

The queues have their own quotas, closed to other namespaces; what belongs to the whole cluster is named after it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from broken_jobs import broken, shell
from kube import Namespace, Object, wait_for
from launching import Gate, Launcher, as_account, pods_of, scripted, tiny
from pipeline_run import PipelineRun
from test_disturbed import Disturbed

from components.cluster.api import Cluster
from components.cluster.look import Look
from components.diagnose.gather import situation
from components.diagnose.why import why
from components.launch.kubernetes import start
from components.plan.admissible import requests
from manifests.kinds import KINDS
from manifests.queue import API, cluster_queue, local_queue, resource_flavor
from manifests.rbac import ROLE
from manifests.spec import JobSpec
from pipelines.doctor.queues import queues
from trainer.errors import LaunchError

pytestmark = pytest.mark.e2e

QUEUE, PLACE = "team", 0.05  # CPUs; the queue has room for two places
TRAINING = 0.2  # CPUs of both workers that really train, in a queue of their own
CLUSTER_WIDE = ("clusterqueue", "resourceflavor", "workloadpriorityclass")
# A worker that saves for a while when it is stopped. Two generations of it at once would be seen in the file `both`.
GENERATIONS = """
dir=/mnt/checkpoints/$RUN-$index; mkdir -p $dir
[ ! -e $dir/alive ] || touch $dir/both
touch $dir/alive
save() { sleep $SAVE; rm $dir/alive; touch $dir/saved; exit 143; }
trap save TERM
if [ -e $dir/saved ]; then rm $dir/alive; echo "worker $index went on"; exit 0; fi
echo "worker $index began"
sleep 600 & wait
"""


@pytest.fixture(scope="module")
def queue(volumes: Namespace) -> Iterator[Namespace]:
    name = volumes.name
    mine = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    small = cluster_queue(name, name, {"cpu": f"{2 * PLACE}", "memory": "1Gi"})
    large = cluster_queue(f"{name}-training", name, {"cpu": f"{TRAINING}", "memory": "4Gi"})
    for each in (small, large):
        each["spec"] |= {"namespaceSelector": mine, "preemption": {"withinClusterQueue": "LowerPriority"}}
    priority = {"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": 1000}
    try:
        volumes.apply(resource_flavor(name), small, large, priority)
        volumes.apply(local_queue(QUEUE, name), local_queue("training", f"{name}-training"))
        active = ("wait", "--for=condition=Active", "--timeout=180s")
        volumes.kubectl(*active, f"clusterqueue/{name}", f"clusterqueue/{name}-training")
        volumes.kubectl(*active, f"localqueue/{QUEUE}", "localqueue/training")
        yield volumes
    finally:
        volumes.kubectl("delete", "localqueue", QUEUE, "training", "--wait=false", check=False)
        for kind in CLUSTER_WIDE:
            names = [name, f"{name}-training"] if kind == "clusterqueue" else [name]
            volumes.kubectl("delete", kind, *names, "--ignore-not-found", "--wait=false", check=False)


def placed(queue: Namespace, places: int = 1, **cluster: object) -> JobSpec:
    """A job that takes some of the queue's places."""
    return tiny(
        queue, cluster={"nodes": 1, "cpus_per_node": places * PLACE, "queue": QUEUE, "grace_seconds": 20} | cluster
    )


def generations(job: JobSpec, save_seconds: int) -> str:
    return GENERATIONS.replace("$RUN", job.run_name).replace("$SAVE", str(save_seconds))


def kinds(queue: Namespace) -> list[str]:
    """The kinds of two jobs; a TrainJob of Trainer 2.1 never starts in a queue."""
    return [kind if queue.trainer() != "2.1" else "pytorchjob" for kind in KINDS]


def begun(queue: Namespace, job: JobSpec, script: str) -> JobSpec:
    start(Cluster.connect(queue.name), scripted(job, script), job.cluster)
    return job


def said(queue: Namespace, job: JobSpec) -> str:
    return str(why(situation(Cluster.connect(queue.name), job.run_name)))


def is_said(queue: Namespace, job: JobSpec, expected: str) -> None:
    """Wait until `yaongi why` answers so."""
    found = wait_for(
        f"an answer like {expected}",
        lambda: said(queue, job),
        180,
        is_there=lambda text: re.search(expected, text) is not None,
    )
    print(f"{job.run_name} is {found}", flush=True)
    assert "\n" not in found


def end(queue: Namespace, *jobs: JobSpec) -> None:
    for job in jobs:
        queue.kubectl("delete", KINDS[job.cluster.job].plural, job.run_name, "--ignore-not-found", "--wait=false")
    for job in jobs:
        wait_for("its pods to go", lambda job=job: not pods_of(queue, job), 120)  # type: ignore[misc]


def test_three_jobs_over_one_quota_and_no_two_generations_of_a_worker(queue: Namespace) -> None:
    """An urgent one takes the places of both others, which save, wait, and go on when it has ended."""
    both = [placed(queue, job=kind) for kind in kinds(queue)]
    for job in both:
        begun(queue, job, generations(job, 4))
    for job in both:
        is_said(queue, job, r"^running: 1 of 1 workers run")
    gate = Gate(queue)
    urgent = begun(queue, placed(queue, 2, queue_priority=queue.name), gate.wait)
    taken = rf"^queued: it waits at place \d of 2 in queue '{QUEUE}', preempted \d+ s ago by a job of higher priority "
    for job in both:
        is_said(queue, job, rf"{taken}\({urgent.run_name}\), and goes on .* more cpu than is free")
    is_said(queue, urgent, r"^running: ")
    gate.open()
    for job in both:
        is_said(queue, job, r"^succeeded: ")
    left = queue.execute("reader", "ls", *(f"/mnt/checkpoints/{job.run_name}-0" for job in both))
    assert left.split().count("saved") == 2 and "both" not in left, left
    end(queue, urgent, *both)


def test_a_launcher_says_why_its_job_waits_and_follows_it_through_a_preemption(
    queue: Namespace, launcher: Launcher
) -> None:
    """With the rights of the launcher's account; to wait is not to start, which has less time here."""
    gate, seen = Gate(queue), Gate(queue)
    before = begun(queue, placed(queue, 2), gate.wait)
    is_said(queue, before, r"^running: ")
    waits = f"it waits at place 1 of 1 in queue '{QUEUE}'"
    launcher.acts["it needs 50m more cpu"] = gate.open
    urgent = placed(queue, 2, queue_priority=queue.name)
    launcher.acts["worker 0 began"] = lambda: begun(queue, urgent, seen.wait)
    launcher.acts[f"{waits}, preempted by"] = seen.open
    job = placed(queue)
    launcher(job, generations(job, 14))  # the other one ends meanwhile: it is admitted again while it still saves
    told = [line.removeprefix("launcher: ") for line in launcher.lines]
    steps = (
        f"{waits}: it needs 50m more cpu",
        f"job {job.run_name} is admitted by queue '{QUEUE}'",
        "worker 0 began",
        f"job {job.run_name} was suspended; it goes on from its last checkpoint",
        f"{waits}, preempted by a job of higher priority, and goes on",
        f"job {job.run_name} is admitted by queue '{QUEUE}'",
        "worker 0 went on",
        f"job {job.run_name} succeeded",
    )
    place = 0
    for step in steps:
        place = next((at + 1 for at, line in enumerate(told[place:], place) if line.startswith(step)), 0)
        assert place, f"no line {step!r} after the one before"
    assert not launcher.has("removed from outside") and launcher.has("exited 143 (stopped (SIGTERM)")
    assert "both" not in queue.execute("reader", "ls", f"/mnt/checkpoints/{job.run_name}-0")
    end(queue, before, urgent, job)


def test_a_launch_that_can_never_be_admitted_ends(queue: Namespace, launcher: Launcher) -> None:
    job = placed(queue, 3)
    with pytest.raises(
        LaunchError, match=r"cannot start: .*it will never fit: it needs 150m of cpu, of which the queue"
    ):
        launcher(job, "true")
    assert not pods_of(queue, job)


def test_a_queued_job_is_stopped_and_resumed_although_its_queue_decides_when_it_runs(
    queue: Namespace, yaongi: Callable[..., tuple[int, str, str]]
) -> None:
    def good(*arguments: str) -> str:
        code, told, error = yaongi(*arguments, "-n", queue.name)
        print(f"$ yaongi {' '.join(arguments)} ({code})\n{told}{error}", flush=True)
        assert code == 0, error
        return told

    gate = Gate(queue)
    before = begun(queue, placed(queue, 2), gate.wait)
    is_said(queue, before, r"^running: ")
    jobs: list[JobSpec] = []
    for place, kind in enumerate(kinds(queue), 1):
        time.sleep(2)  # a queue orders by whole seconds: of two jobs of the same one, either may be the first
        jobs.append(begun(queue, placed(queue, job=kind), "trap 'exit 143' TERM; sleep 600 & wait"))
        waits = rf"^queued: it waits at place {place} of {place} in queue '{QUEUE}': it needs 50m more cpu"
        is_said(queue, jobs[-1], waits)
    assert f"state       queued: it waits at place 2 of 2 in queue '{QUEUE}'" in good("status", jobs[1].run_name)
    for job in jobs:
        assert "; none of its pods was running yet; continue: " in good("stop", job.run_name)
    wait_for("no Workload to be left", lambda: len(queue.find("workloads")) == 1, 180)
    for job in jobs:
        good("resume", job.run_name)
        is_said(queue, job, rf"^queued: it waits at place \d of \d in queue '{QUEUE}': it needs")
    gate.open()
    for job in jobs:
        is_said(queue, job, r"^running: ")
        good("stop", job.run_name)
        assert not pods_of(queue, job), "its queue would have started it again"
    end(queue, before, *jobs)


def test_the_doctor_looks_at_the_queue(queue: Namespace) -> None:
    def found(cluster: Cluster, **changes: object) -> dict[str, str]:
        job = placed(queue, **{"queue_priority": queue.name} | changes)
        return {each.what: each.state for each in queues(Look(cluster), job.cluster, requests(job))}

    everything = found(Cluster.connect(queue.name))
    assert everything.pop("Kueue's version") != "no"
    assert everything == {"Kueue": "ok", "queue's quota": "ok", "queue's priority": "ok"}
    assert found(Cluster.connect(queue.name), cpus_per_node=1)["queue's quota"] == "no"
    assert found(Cluster.connect(queue.name), queue_priority="absent")["queue's priority"] == "no"
    launchers = found(as_account(queue, ROLE))
    assert launchers["Kueue"] == "ok" and "queue's rights" not in launchers, "its role has them"


CAUSES = {
    "no-such-queue": ({"queue": "absent"}, r"the namespace has no LocalQueue 'absent'; kubectl get localqueues"),
    "no-such-class": ({"queue_priority": "absent"}, r"there is no WorkloadPriorityClass 'absent'; kubectl get"),
    "never": (
        {"cpus_per_node": 7},
        r"it will never fit: it needs 7 of cpu, of which the queue never has more than 100m",
    ),
    "racks": ({"topology": {"required": "rack"}}, r"the queue's nodes \(flavor \S+\) have no topology; remove"),
    "gpu": ({"gpus_per_node": 1}, r"its ClusterQueue has no quota for nvidia\.com/gpu; name a queue that has it"),
}


@pytest.fixture(scope="module")
def hindered(queue: Namespace) -> Iterator[Namespace]:
    """All of CAUSES at once, by name."""
    objects: list[Object] = []
    for name, (cluster, _) in CAUSES.items():
        objects += broken(name, queue.name, shell("true"), **{"queue": QUEUE} | cluster)
    queue.apply(*objects)
    yield queue
    queue.kubectl("delete", "pytorchjobs", *CAUSES, "--wait=false")


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_and_the_remedy_are_named(hindered: Namespace, name: str) -> None:
    expected = rf"^queued: it (?:waits|cannot) .*{CAUSES[name][1]}"
    cluster = Cluster.connect(hindered.name)
    found = wait_for(
        f"an answer like {expected}",
        lambda: str(why(situation(cluster, name))),
        180,
        is_there=lambda text: re.search(expected, text) is not None,
    )
    print(f"{name} is {found}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_preempted_training_ends_with_the_losses_of_an_undisturbed_one(
    first: PipelineRun, queue: Namespace, kind: str
) -> None:
    assert first.code == 0, first.log
    if kind not in kinds(queue):
        never = begun(queue, placed(queue, job=kind), "true")
        is_said(queue, never, "^queued: its queue admitted it .* as TrainJobs stay under Kubeflow Trainer 2.1")
        end(queue, never)
        return
    settings = {"job": kind, "queue": "training", "cpus_per_node": TRAINING / 2, "start_timeout_seconds": 300}
    changes = [f"cluster.{field}={value}" for field, value in settings.items()]
    run = PipelineRun.start_training(queue, f"queued-{kind}", "train.checkpoint.every_steps=30", *changes)
    disturbed = Disturbed(run)
    disturbed.reach("step 5", lambda step, _: step >= 5, 600)
    urgent = tiny(
        queue, cluster={"nodes": 1, "cpus_per_node": TRAINING, "queue": "training", "queue_priority": queue.name}
    )
    begun(queue, urgent, "sleep 1")
    run.finish()
    assert run.code == 0, run.log
    assert run.losses == first.losses
    _, starts = disturbed.look()
    assert len(starts) == 2 and starts[1] >= 5, "the step that it was at is saved, though no checkpoint was due"
    assert f"job {run.job.run_name} was suspended; it goes on from its last checkpoint" in run.log
    assert "exited 143 (stopped (SIGTERM); checkpoint saved)" in run.log
    terminated = [record["reasons"] for record in run.read_json("restarts.json")["nodes"].values()]
    assert all(reasons.get("terminated") == 1 for reasons in terminated), terminated
    end(queue, urgent, run.job)
