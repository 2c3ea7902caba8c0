"""`yaongi why` on jobs that a real cluster cannot run, one for each cause; all are created first, then diagnosed."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator

import pytest
from broken_jobs import (
    CLUSTER_WIDE,
    Change,
    apart,
    asking,
    broken,
    claim,
    in_container,
    in_pod,
    in_policy,
    in_spec,
    mounting,
    restarting,
    secret,
    shell,
    surroundings,
)
from kube import Namespace, pod, wait_for
from launching import BUSYBOX

from components.cluster.api import Cluster
from components.diagnose.gather import situation
from components.diagnose.why import why

pytestmark = pytest.mark.e2e

# Name → changes to a working job, and what the answer must contain. PyTorchJobs, or TrainJobs where marked.
CAUSES: dict[str, tuple[list[Change], str]] = {
    "quota": ([asking("amd.com/gpu", "1")], r"^queued: .* exceeded quota: team.*kubectl describe quota team\)"),
    "gpu": ([asking("nvidia.com/gpu", "1")], r"^queued: .*Insufficient nvidia\.com/gpu.*cluster\.gpus_per_node"),
    "cpu": ([asking("cpu", "5000")], r"^queued: cpu-worker-0 cannot be scheduled: .*Insufficient cpu.*cpus_per_node"),
    "memory": ([asking("memory", "100Ti")], r"^queued: .*Insufficient memory.*cluster\.memory_gib_per_node"),
    "selector": ([in_pod(nodeSelector={"accelerator": "h100"})], r"^queued: .*affinity/selector.*cluster\.node_selec"),
    "taint": ([], r"^queued: .*\(yaongi-why-\w+: team=other:NoSchedule.*cluster\.tolerations"),
    "image": ([in_container(image="localhost/absent:1")], r"^starting: .*localhost/absent:1'.*loaded into every node"),
    "registry": ([in_container(image="127.0.0.1:1/x:1")], r"^starting: .*its registry, which does not answer"),
    "badimage": ([in_container(image="UPPER:::x")], r"^starting: .*InvalidImageName.*correct cluster\.image"),
    "noclaim": ([claim("nowhere")], r"^queued: .*create the claim 'nowhere'"),
    "unbound": ([claim("unbound")], r"^queued: .*claim 'unbound': storageclass\S* \"absent\" not found.*storage class"),
    "later": ([claim("later")], r"^queued: .*a claim waits for its first pod"),
    "far": ([claim("far")], r"^queued: .*a volume lies in another zone or on another node"),
    "security": ([in_pod(hostNetwork=True)], r"^queued: .*violates PodSecurity.*securityContext"),
    "policy": ([], r"^queued: .*pods must name a cost centre; change the job as the policy wants"),
    "account": ([in_pod(serviceAccountName="absent")], r"^queued: .*kubectl create serviceaccount absent"),
    "secret": ([secret("absent")], r"^starting: .*create the secret 'absent' in the job's namespace"),
    "key": ([secret("present")], r"^starting: .*add the key 'token' to Secret 'present'"),
    "config": ([mounting("absent")], r"^starting: .*cannot be mounted.*create the configmap 'absent'"),
    "suspended": ([in_policy(suspend=True)], r'^suspended: someone has suspended it.*"runPolicy":\{"suspend":false'),
    "managed": ([in_policy(managedBy="kueue.x-k8s.io/multikueue")], r"^queued: it is left to 'kueue.x-k8s.io/multik"),
    "badspec": ([shell("sleep 1; exit 2")], r"^failed: badspec-worker-0 on node \S+ exited 2 \(bad spec\)"),
    "traceback": (
        [shell("echo boom; exit 1")],
        r"^failed: .*exited 1 \(ended without giving a reason.*: boom; the log says more",
    ),
    "looping": (
        [shell("echo boom; exit 3"), restarting("OnFailure")],
        r"^restarting: looping-worker-0 keeps crashing, (once|\d+ times) so far: exit code 3 .*: boom",
    ),
    "communication": (
        [shell("exit 160")],
        r"^(restarting|running): .*(once|times) so far: .* exited 160 \(communication with another rank failed\)",
    ),
    "memory-spent": ([shell("tail /dev/zero")], r"times so far: .*exited 137 \(out of memory; raise cluster\.memory_"),
    "deadline": (
        [in_policy(activeDeadlineSeconds=4), shell("sleep 6; exit 160")],
        r"^failed: its activeDeadlineSeconds have passed.*cluster\.run_timeout_seconds",
    ),
    "gang": (
        [apart],
        r"^queued: gang-worker-\d cannot be scheduled: .*anti-affinity.*; short by 1 of 2 workers",
    ),
    "silent": ([], r"^starting: silent-worker-0 cannot start: node yaongi-why-\w+ does not answer"),
    "fine": ([], r"^running: 1 of 1 workers run, for \d+ s$"),
    "done": ([shell("sleep 1")], r"^succeeded: all workers have finished$"),
    "lost": ([], r"^ending: lost-worker-0 cannot end: stuck Terminating on node yaongi-why-\w+, which does not answer"),
    "train-quota": ([asking("amd.com/gpu", "1")], r"^queued: .*exceeded quota: team.*kubectl describe quota team\)"),
    "train-cpu": ([asking("cpu", "5000")], r"^queued: .*Insufficient cpu.*cluster\.cpus_per_node"),
    "train-image": ([in_container(image="localhost/absent:1")], r"^starting: .*localhost/absent:1' cannot be pulled"),
    "train-suspended": ([in_spec(suspend=True)], r"^suspended: someone has suspended it.*kubectl patch trainjob"),
    "train-badspec": ([shell("exit 2")], r"^failed: .*exited 2 \(bad spec\)"),
    "train-fine": ([], r"^running: 1 of 1 workers run"),
}


@pytest.fixture(scope="module")
def broken_jobs(namespace: Namespace) -> Iterator[Namespace]:
    """A separate namespace, with a quota and rules that would disturb other tests."""
    space = Namespace(f"yaongi-why-{uuid.uuid4().hex[:6]}")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    space.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space.name, "labels": labels}})
    elsewhere = {"taint": {"nodeSelector": {"node-of": space.name}}}
    elsewhere |= {name: {"nodeName": space.name} for name in ("silent", "lost")}
    elsewhere["silent"]["tolerations"] = [{"operator": "Exists"}]  # otherwise it is evicted some minutes later
    try:
        space.made()
        space.apply(*surroundings(space.name))
        wait_for("the quota", lambda: space.find("resourcequotas")[0].get("status", {}).get("hard"), 120)
        # A new policy is in force a little later; a pod like kube.pod's meets the restricted standard.
        plain = json.dumps(pod("policy-probe", BUSYBOX, ["true"], mounts={}))
        dry_run = ("apply", "--dry-run=server", "-f", "-")
        wait_for("the policy", lambda: not space.kubectl(*dry_run, stdin=plain, check=False), 120)
        objects = []
        for name, (changes, _) in CAUSES.items():
            cluster = {"nodes": 2} if name == "gang" else {}
            if name.startswith("train-"):
                cluster["job"] = "trainjob"
            objects += broken(name, space.name, *changes, in_pod(**elsewhere.get(name, {})), **cluster)
        # The operator of TrainJobs must have seen a runtime before it admits a job with it.
        space.apply(*(item for item in objects if item["kind"] == "TrainingRuntime"))
        space.apply(*(item for item in objects if item["kind"] == "PyTorchJob"))
        space.apply_when_admitted(*(item for item in objects if item["kind"] == "TrainJob"))
        wait_for("a pod that will be lost", lambda: "lost-worker-0" in space.kubectl("get", "pods"), 300)
        space.kubectl("delete", "pytorchjob", "lost", "--wait=false")
        yield space
    finally:
        for kind in CLUSTER_WIDE:
            space.kubectl("delete", kind, space.name, "--ignore-not-found", "--wait=false", check=False)
        space.kubectl("delete", "namespace", space.name, "--wait=false")


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_and_the_remedy_are_named(broken_jobs: Namespace, name: str) -> None:
    cluster, expected = Cluster.connect(broken_jobs.name), CAUSES[name][1]
    said = wait_for(
        f"an answer like {expected}",
        lambda: str(why(situation(cluster, name))),
        180,
        is_there=lambda text: re.search(expected, text) is not None,
    )
    print(f"{name} is {said}")
    assert "\n" not in said


def test_the_command_takes_the_beginning_of_a_name_and_lists_what_it_could_be(
    broken_jobs: Namespace, yaongi: Callable[..., tuple[int, str, str]]
) -> None:
    place = ("-n", broken_jobs.name)
    begins = "noclaim is queued: noclaim-worker-0 cannot be scheduled: "
    wait_for(begins, lambda: yaongi("why", "noclai", *place)[1], 180, is_there=lambda text: text.startswith(begins))
    code, _, error = yaongi("why", "train-", *place)
    assert code == 2 and "'train-' is the beginning of several runs: train-badspec, " in error
    code, _, error = yaongi("why", "nothing", *place)
    assert code == 2 and f"among the jobs of namespace '{broken_jobs.name}'; known: " in error


def test_a_job_that_is_gone_leaves_its_last_event(broken_jobs: Namespace) -> None:
    cluster = Cluster.connect(broken_jobs.name)
    wait_for("it to end", lambda: str(why(situation(cluster, "done"))).startswith("succeeded"), 180)
    broken_jobs.kubectl("delete", "pytorchjob", "done")
    wait_for("its pods to go", lambda: not situation(cluster, "done").pods, 120)
    said = str(why(situation(cluster, "done")))
    assert re.match(r"gone: .*removed after its time to live \(last event, \d+ s ago: .*\); start it again$", said), (
        said
    )
