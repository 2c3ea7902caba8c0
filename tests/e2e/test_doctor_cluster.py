"""`yaongi doctor` against a real cluster: a namespace that is ready, an empty one, an account without rights."""

from __future__ import annotations

import pytest
from launching import as_account

from components.cluster.api import Cluster
from manifests.rbac import ROLE
from manifests.spec import load_job
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


def test_a_ready_namespace_lacks_only_what_is_optional(volumes):
    """With claims that are bound, as a pod has them."""
    found = look(volumes.name, "tiny")
    assert states(found, "no") == set()
    assert states(found, "ok") == {
        "cluster", "clock", "namespace", "permissions", "service account", "PyTorchJob", "PyTorchJob operator",
        "TrainJob", "TrainJob operator", "claim llm-datasets-pvc", "claim llm-checkpoints-pvc", "capacity",
    }  # fmt: skip
    assert "enforces restricted" in found["namespace"].detail
    assert "training-operator:v1.9" in found["PyTorchJob operator"].detail
    assert "Bound" in found["claim llm-datasets-pvc"].detail
    assert "ReadWriteMany" in found["claim llm-datasets-pvc"].detail
    # A cluster without GPUs, Kueue, Prometheus' operator, KFP.
    assert states(found, "missing") == {"GPUs", "Kueue", "monitoring", "secret", "Kubeflow Pipelines"}
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
    assert queued["Kueue"].state == "no" and "Kueue" in queued["Kueue"].detail


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


def test_a_namespace_that_does_not_exist():
    found = look("no-such-namespace")
    assert found["namespace"].state == "no" and "--namespace" in found["namespace"].remedy
