"""What `yaongi doctor` says of the queue that a job names, from objects as Kueue 0.17 has them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from manifests.clusterspec import ClusterSpec
from pipelines.doctor import queues
from pipelines.doctor.findings import Finding
from trainer.errors import LaunchError

Object = dict[str, Any]
API = "/apis/kueue.x-k8s.io/v1beta2"
LOCAL, QUEUE = f"{API}/namespaces/team/localqueues/gpus", f"{API}/clusterqueues/lab"
POD = {"cpu": Decimal(90), "memory": Decimal(900 * 2**30), "nvidia.com/gpu": Decimal(8)}


class Cluster:
    """Objects by path, of a Kueue 0.17 whose queue can hold the job."""

    namespace = "team"

    def __init__(self) -> None:
        self.may_read, self.images = True, ["registry.k8s.io/kueue/kueue:v0.17.0", "ghcr.io/kubeflow/trainer:v2.3.0"]
        self.objects: dict[str, Object] = {
            "/apis/kueue.x-k8s.io": {"versions": [{"version": "v1beta2"}, {"version": "v1beta1"}]},
            LOCAL: {"spec": {"clusterQueue": "lab"}, "status": active("True", "Can submit new workloads")},
            QUEUE: {
                "spec": {"resourceGroups": [group(flavor("h100", cpu="192", memory="2Ti", gpu="16"))]},
                "status": active("True", "Can admit new workloads"),
            },
        }

    def get(self, path: str) -> Object | None:
        return self.objects.get(path)

    def items(self, path: str) -> list[Object]:
        assert path == "/apis/apps/v1/deployments"
        pods = [{"spec": {"containers": [{"image": image}]}} for image in self.images]
        return [{"spec": {"template": pod}} for pod in pods]

    def post(self, path: str, body: Object) -> Object:
        return {"status": {"allowed": self.may_read}}

    def found(self, **changes: Any) -> dict[str, Finding]:
        spec = ClusterSpec.model_validate({"queue": "gpus", "nodes": 2} | changes)
        return {finding.what: finding for finding in queues.queues(self, spec, POD)}  # type: ignore[arg-type]


def active(status: str, message: str) -> Object:
    return {"conditions": [{"type": "Active", "status": status, "message": message}]}


def flavor(name: str, gpu: str = "", borrow: str = "", **amounts: str) -> Object:
    amounts |= {"nvidia.com/gpu": gpu} if gpu else {}
    more = {"borrowingLimit": borrow} if borrow else {}
    return {"name": name, "resources": [{"name": n, "nominalQuota": q, **more} for n, q in amounts.items()]}


def group(*flavors: Object) -> Object:
    return {"coveredResources": [each["name"] for each in flavors[0]["resources"]], "flavors": list(flavors)}


def test_a_queue_that_can_hold_the_job_is_good():
    found = Cluster().found()
    assert {what: finding.state for what, finding in found.items()} == {
        "Kueue": "ok",
        "Kueue's version": "ok",
        "queue's quota": "ok",
    }


def test_a_queue_that_is_absent_or_closed_is_named():
    cluster = Cluster()
    cluster.objects[LOCAL]["status"] = active("False", "LocalQueue is stopped")
    found = cluster.found()["Kueue"]
    assert (found.state, found.detail) == ("no", "queue 'gpus' takes no jobs: LocalQueue is stopped")
    cluster.objects[QUEUE]["status"] = active("False", "Can't admit new workloads: is stopped.")
    found = cluster.found()["queue's quota"]
    assert found.state == "no" and found.detail.startswith("ClusterQueue 'lab' admits nothing: Can't admit")
    del cluster.objects[QUEUE]
    assert cluster.found()["queue's quota"].detail == "there is no ClusterQueue 'lab'"
    del cluster.objects[LOCAL]
    (found,) = cluster.found().values()
    assert found.state == "no" and "no LocalQueue 'gpus'" in found.detail
    cluster.objects.clear()
    (found,) = cluster.found().values()
    assert found.state == "no" and "has no Kueue" in found.detail
    (found,) = cluster.found(queue=None).values()
    assert found.state == "missing"


@pytest.mark.parametrize(
    ("groups", "cohort", "said"),
    [
        (
            [group(flavor("h100", cpu="96", memory="2Ti", gpu="8"))],
            "",
            "180 of cpu needed, at most 96 in flavor h100; ",
        ),
        ([group(flavor("h100", cpu="192", memory="1Ti", gpu="16"))], "", "1800 GiB of memory needed, at most 1024 GiB"),
        ([group(flavor("h100", cpu="192", memory="2Ti"))], "", "no quota for nvidia.com/gpu"),
        # No flavor has all of it, though together they would.
        (
            [group(flavor("a", cpu="192", memory="2Ti", gpu="8"), flavor("b", cpu="90", memory="2Ti", gpu="16"))],
            "",
            "16 of nvidia.com/gpu needed, at most 8 in flavor a",
        ),
        (
            [group(flavor("a", cpu="1", memory="2Ti", gpu="8"), flavor("b", cpu="192", memory="2Ti", gpu="16"))],
            "",
            None,
        ),
        ([group(flavor("h100", cpu="1", memory="1Ti", gpu="8"))], "all", None),  # the cohort may lend what it lacks
        ([group(flavor("h100", cpu="100", memory="2Ti", gpu="16", borrow="40"))], "all", "at most 140 in flavor h100"),
    ],
)
def test_a_quota_that_can_never_hold_the_job_is_told(groups: list[Object], cohort: str, said: str | None):
    cluster = Cluster()
    cluster.objects[QUEUE]["spec"] = {"resourceGroups": groups} | ({"cohortName": cohort} if cohort else {})
    found = cluster.found()["queue's quota"]
    assert found.state == ("no" if said else "ok") and (said or "can hold the job") in found.detail, found


def test_an_unknown_version_is_told():
    cluster = Cluster()
    cluster.images[0] = "registry.k8s.io/kueue/kueue:v0.21.0"
    found = cluster.found()["Kueue's version"]
    assert found.state == "missing" and found.remedy.startswith("queued jobs were tried with Kueue 0.17;")
    cluster.objects["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v2"}]}
    (found,) = cluster.found().values()
    assert found.state == "missing" and found.detail.startswith("serves kueue.x-k8s.io only as v2;")


def test_a_queued_trainjob_needs_trainer_2_2():
    cluster = Cluster()
    cluster.images[1] = "ghcr.io/kubeflow/trainer/trainer-controller-manager:v2.1.0"
    found = cluster.found(job="trainjob")["Kueue's version"]
    assert found.state == "no" and found.detail.startswith("TrainJobs in a queue never start: ")
    assert cluster.found()["Kueue's version"].state == "ok", "PyTorchJobs do"
    cluster.images[1] = "ghcr.io/kubeflow/trainer/trainer-controller-manager:v2.2.0"
    assert cluster.found(job="trainjob")["Kueue's version"].state == "ok"


def test_the_priority_class_and_the_rights_are_looked_at():
    cluster = Cluster()
    assert cluster.found(queue_priority="urgent")["queue's priority"].state == "no"
    cluster.objects[f"{API}/workloadpriorityclasses/urgent"] = {"value": 1000}
    assert cluster.found(queue_priority="urgent")["queue's priority"].detail == "class 'urgent' has priority 1000"
    cluster.may_read = False
    found = cluster.found()["queue's rights"]
    assert (
        found.state == "missing" and "may not list workloads, get localqueues, get localqueues/pendingw" in found.detail
    )


def test_what_may_not_be_read_is_unknown():
    cluster = Cluster()
    read = cluster.get

    def get(path: str) -> Object | None:
        if path == QUEUE:
            raise LaunchError(f"this account may not read {path}")
        return read(path)

    cluster.get = get  # type: ignore[method-assign]
    assert cluster.found()["queue's quota"].state == "unknown"
