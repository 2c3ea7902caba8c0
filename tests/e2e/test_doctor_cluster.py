"""`yaongi doctor` against a real cluster: a namespace that is ready, an empty one, an account without rights."""

from __future__ import annotations

import re

import pytest
from kube import PIPELINE_IMAGE, Namespace, wait_for
from launching import as_account

from components.cluster.api import Cluster
from components.cluster.look import Look
from manifests import netprobe
from manifests.rbac import ROLE
from manifests.spec import load_job
from pipelines.doctor import network
from pipelines.doctor.cluster import examine
from pipelines.doctor.findings import Finding

pytestmark = pytest.mark.e2e


def look(space: str | Cluster, job: str = "", changes: dict | None = None) -> dict[str, Finding]:
    connected = Cluster.connect(space) if isinstance(space, str) else space
    found = {finding.what: finding for finding in examine(connected, load_job(job, changes) if job else None)}
    for finding in found.values():
        print(f"{finding.what:26} {finding.state:8} {finding.detail}")
    return found


def states(found: dict[str, Finding], state: str) -> set[str]:
    return {finding.what for finding in found.values() if finding.state == state}


@pytest.fixture(scope="module", autouse=True)
def operators_ready():
    """A readiness probe may fail on a busy node, and doctor looks once."""
    for space, operator in {
        "kubeflow": "training-operator",
        "kubeflow-system": "kubeflow-trainer-controller-manager",
    }.items():
        Namespace(space).kubectl("wait", "--for=condition=Available", f"deployment/{operator}", "--timeout=180s")


def test_a_ready_namespace_lacks_only_what_is_optional(volumes):
    """With claims that are bound, as a pod has them."""
    found = look(volumes.name, "tiny")
    assert states(found, "no") == set()
    assert states(found, "ok") == {
        "cluster", "clock", "namespace", "permissions", "service account", "PyTorchJob", "PyTorchJob operator",
        "TrainJob", "TrainJob operator", "claim llm-datasets-pvc", "claim llm-checkpoints-pvc", "capacity", "Kueue",
    }  # fmt: skip
    assert "enforces restricted" in found["namespace"].detail
    assert "training-operator:v1.9" in found["PyTorchJob operator"].detail
    assert "Bound" in found["claim llm-datasets-pvc"].detail
    assert "ReadWriteMany" in found["claim llm-datasets-pvc"].detail
    trainer = re.search(r":v(2\.[123])\.", found["TrainJob operator"].detail)
    assert trainer and trainer[1] == volumes.trainer()
    assert ("in a queue of Kueue 0.17 never start" in found["TrainJob operator"].detail) is (trainer[1] == "2.1")
    # A cluster without GPUs, Prometheus' operator, KFP.
    assert states(found, "missing") == {"GPUs", "monitoring", "secret", "Kubeflow Pipelines"}
    assert all(found[what].remedy for what in states(found, "missing"))


def test_what_an_empty_namespace_lacks_is_named_with_a_remedy(empty_namespace):
    found = look(empty_namespace.name)
    assert states(found, "no") == {"claim llm-datasets-pvc", "claim llm-checkpoints-pvc"}
    assert f"kubectl apply -n {empty_namespace.name}" in found["claim llm-datasets-pvc"].remedy
    assert "default storage class is standard" in found["claim llm-datasets-pvc"].detail
    assert found["service account"].state == "missing"
    assert found["service account"].remedy.startswith(f"python -m manifests.generate rbac {empty_namespace.name}")


def test_a_claim_of_one_node_will_not_do_for_two(empty_namespace):
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "mine"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
    }
    empty_namespace.apply(claim)
    empty_namespace.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/mine", "--timeout=300s")
    storage = {"storage": {"datasets_pvc": "mine", "checkpoints_pvc": "mine"}}
    assert look(empty_namespace.name, "tiny", storage)["claim mine"].state == "no"
    alone = look(empty_namespace.name, "tiny", {**storage, "cluster": {"nodes": 1}})["claim mine"]
    assert alone.state == "missing" and "ReadWriteMany" in alone.remedy


def test_a_job_that_no_node_can_hold(namespace):
    found = look(namespace.name, "h100-4b")
    assert found["capacity"].state == "no"
    assert "nvidia.com/gpu" in found["capacity"].detail and "cluster.gpus_per_node" not in found["capacity"].detail
    queued = look(namespace.name, "tiny", {"cluster": {"queue": "team"}})
    assert queued["Kueue"].state == "no" and "has no LocalQueue 'team'" in queued["Kueue"].detail


def test_an_account_is_told_what_it_may_not_do(namespace):
    """The launcher's own account has every right that it needs; the default one none."""
    launcher = look(as_account(namespace, ROLE))
    assert launcher["permissions"].state == "ok"
    assert states(launcher, "no") == set(), "what it may not see is unknown, not absent"
    assert {"secret", "nodes"} <= states(launcher, "unknown")
    nobody = look(as_account(namespace, "default"))
    assert nobody["permissions"].state == "no"
    assert "create/get/list/watch/patch/delete pytorchjobs" in nobody["permissions"].detail
    assert f"rbac {namespace.name}" in nobody["permissions"].remedy


def test_pods_find_whether_the_network_enforces_policies_and_nothing_stays(namespace):
    """No network of a test cluster has enforced them so far; where one does, nothing may be open."""
    found = {each.what: each for each in network.findings(Look(Cluster.connect(namespace.name)), PIPELINE_IMAGE)}
    print({what: (finding.state, finding.detail) for what, finding in found.items()})
    assert {found[what].state for what in ("rank to rank", "DNS", "metrics")} == {"ok"}
    enforced = found["enforcement"].state
    assert enforced in ("ok", "missing") and found["worker to the API server"].state == enforced
    assert ("does not enforce" in found["enforcement"].detail) == (enforced == "missing")
    wait_for("its objects to go", lambda: not namespace.find("jobs,pods", "-l", netprobe.ROLE_LABEL), 180)
    wait_for(
        "its policy to go", lambda: "/doctor-" not in namespace.kubectl("get", "networkpolicies", "-o", "name"), 180
    )


def test_who_may_not_make_pods_is_told_so(namespace):
    (found,) = network.findings(Look(as_account(namespace, "default")), PIPELINE_IMAGE)
    assert found.state == "unknown" and "create/delete jobs" in found.detail


def test_a_namespace_that_does_not_exist():
    found = look("no-such-namespace")
    assert found["namespace"].state == "no" and "--namespace" in found["namespace"].remedy
