"""`yaongi doctor` without a cluster: this machine, and nodes as listed by an API server."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ports import free_port

from components.cluster.api import Refused
from manifests.clusterspec import ClusterSpec
from manifests.spec import load_job
from pipelines import refusals
from pipelines.doctor import capacity, cluster, machine, operators, volumes
from trainer.errors import VolumeError


def node(gpus: int = 8, cpu: str = "96", memory: str = "1000Gi", ready: str = "True", **spec: object) -> dict:
    labels = {"nvidia.com/gpu.product": "H100", "nvidia.com/cuda.driver-version.full": "570.1", "pool": "train"}
    return {
        "metadata": {"labels": labels},
        "spec": spec,
        "status": {
            "allocatable": {"cpu": cpu, "memory": memory, "nvidia.com/gpu": str(gpus)},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


TWO_BY_EIGHT = {"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 90, "memory_gib_per_node": 900}


def fit(listed: list[dict], **changes: object) -> tuple[str, str]:
    (finding,) = capacity.fits(listed, ClusterSpec.model_validate({**TWO_BY_EIGHT, **changes}))
    assert bool(finding.remedy) == (finding.state != "ok")
    return finding.state, finding.detail


def test_device_classes_of_the_job_must_be_there():
    asked = ClusterSpec(devices={"nic.example.com": 8, "gpu.example.com": 1})
    there = SimpleNamespace(get=lambda path: {"kind": "DeviceClass"} if path.endswith("/nic.example.com") else None)
    found = list(capacity.devices(there, asked))
    assert [finding.state for finding in found] == ["ok", "no"] and "'gpu.example.com'" in found[1].detail


def test_nodes_must_have_the_devices_that_a_job_names():
    with_card = node()
    with_card["status"]["allocatable"]["rdma/hca"] = "1"
    asked = {"resources": {"rdma/hca": 1, "deviceclass.resource.kubernetes.io/nic": 8}}
    assert fit([with_card, with_card], **asked)[0] == "ok"
    state, detail = fit([with_card, node()], **asked)
    assert state == "no" and "only 1 fit" in detail
    assert "enough rdma/hca" in fit([node(), node()], **asked)[1]


def test_gpus_are_counted_by_kind_and_driver():
    (finding,) = capacity.gpus([node(), node(gpus=4), node(gpus=0)])
    assert (finding.state, finding.detail) == ("ok", "12 × H100, driver 570.1")
    (none,) = capacity.gpus([node(gpus=0)])
    assert none.state == "missing" and "device plugin" in none.remedy


@pytest.mark.parametrize(
    ("nodes", "state", "said"),
    [
        ([node(), node()], "ok", "2 fit on 2 of 2 nodes"),
        ([node()], "no", "only 1 fit"),
        ([node(), node(gpus=4)], "no", "only 1 fit"),
        ([node(cpu="64"), node(cpu="64000m")], "no", "no usable node has enough cpu "),
        ([node(memory="800Gi")] * 2, "no", "enough memory "),
        ([node(), node(unschedulable=True)], "no", "1 of 2 nodes are ready"),
        ([node(), node(ready="Unknown")], "no", "1 of 2 nodes are ready"),
        ([node(), node(taints=[{"key": "team", "value": "a", "effect": "NoSchedule"}])], "no", "only 1 fit"),
        ([node(), node(taints=[{"key": "team", "value": "a", "effect": "PreferNoSchedule"}])], "ok", "2 fit"),
        ([node(), node(taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])], "ok", "2 fit"),
    ],
)
def test_a_job_fits_on_nodes_that_it_may_use(nodes, state, said):
    found, detail = fit(nodes)
    assert found == state and said in detail


def test_selectors_and_tolerations_decide_which_nodes_count():
    tainted = [node(taints=[{"key": "team", "value": "a", "effect": "NoSchedule"}]) for _ in range(2)]
    assert fit(tainted, tolerations=[{"key": "team", "value": "a", "effect": "NoSchedule"}])[0] == "ok"
    assert fit(tainted, tolerations=[{"operator": "Exists"}])[0] == "ok"
    assert fit(tainted, tolerations=[{"key": "team", "value": "b"}])[0] == "no"
    assert fit([node(), node()], node_selector={"pool": "train"})[0] == "ok"
    assert fit([node(), node()], node_selector={"pool": "other"})[0] == "no"


def test_small_pods_share_a_node():
    assert fit([node()], gpus_per_node=0, nodes=10, cpus_per_node=9, memory_gib_per_node=50)[0] == "ok"


def kubeconfig(path: Path) -> None:
    """The kubeconfig of a cluster at a port where nothing listens."""
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    there = {"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}
    config = {"contexts": [context], "current-context": "c", "clusters": [there], "users": [{"name": "u", "user": {}}]}
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))


def test_a_cluster_that_does_not_answer_stops_only_who_wants_it(monkeypatch, tmp_path):
    kubeconfig(tmp_path / "config")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    (unasked,) = cluster.findings(None, None, is_asked=False)
    assert unasked.state == "missing" and "https://127.0.0.1:9 cannot be reached" in unasked.detail
    (asked,) = cluster.findings("mine", None, is_asked=True)
    assert asked.state == "no"


def test_pipelines_are_looked_for_where_kfp_host_says():
    (unset,) = operators.pipelines("")
    assert unset.state == "missing" and "KFP_HOST" in unset.remedy
    (silent,) = operators.pipelines("http://127.0.0.1:9")
    assert silent.state == "no" and "http://127.0.0.1:9 does not answer" in silent.detail
    (nonsense,) = operators.pipelines("nowhere")
    assert nonsense.state == "no"


def of_machine(workdir: Path) -> dict[str, machine.Finding]:
    return {finding.what: finding for finding in machine.findings(workdir)}


def operator_found(image: str, published: str = "", lists: bool = True) -> operators.Finding:
    """The finding about the operator of a cluster with Trainer alone, run from this image."""
    deployment = {
        "metadata": {"namespace": "kubeflow-system", "name": "trainer"},
        "spec": {"template": {"spec": {"containers": [{"image": image}]}}},
        "status": {"readyReplicas": 1},
    }
    answers = {
        "/apis/trainer.kubeflow.org/v1alpha1": {"resources": [{"name": "trainjobs"}]},
        "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public": {
            "data": {"kubeflow_trainer_version": published}
        },
    }

    def items(path: str) -> list[dict]:
        if not lists:
            raise Refused(403, f"this account may not read {path}")
        return [deployment]

    look = SimpleNamespace(get=answers.get, items=items)
    return next(found for found in operators.job_kinds(look, None) if found.what == "TrainJob operator")


@pytest.mark.parametrize(
    ("image", "published", "state", "said"),
    [
        ("ghcr.io/kubeflow/trainer/trainer-controller-manager:v2.3.0", "v2.3.0", "ok", ":v2.3.0"),
        ("localhost/trainer:v2.2.1", "", "ok", "runs localhost/trainer:v2.2.1"),
        ("localhost/trainer:v2.1.0", "", "ok", "in a queue of Kueue 0.17 never start"),
        ("localhost/trainer@sha256:" + "0" * 64, "v2.3.0", "ok", "runs localhost/trainer@sha256"),
        ("localhost/trainer@sha256:" + "0" * 64, "", "missing", "they are then refused by name"),
        ("localhost/trainer:v2.4.0", "v2.4.0", "missing", "use a version from 2.1 up to 2.4 (not included)"),
        ("localhost/trainer:v2.0.1", "", "missing", "use a version from 2.1"),
    ],
)
def test_the_release_of_trainer_is_told_with_what_it_means(image, published, state, said):
    found = operator_found(image, published)
    assert found.state == state and said in f"{found.detail}; {found.remedy}"
    assert bool(found.remedy) == (state != "ok")


def test_the_release_of_trainer_is_known_to_accounts_that_see_no_deployments():
    found = operator_found("", "v2.3.0", lists=False)
    assert (found.state, found.remedy) == ("ok", "") and "it says that it is v2.3.0" in found.detail
    assert operator_found("", "v3.0.0", lists=False).state == "missing"
    assert operator_found("", "", lists=False).state == "unknown"


def test_a_machine_with_little_shared_memory_is_told(monkeypatch, tmp_path):
    assert of_machine(tmp_path)["/dev/shm"].state == "ok"
    monkeypatch.setattr(machine, "MIN_SHM_GIB", 1e6)
    little = of_machine(tmp_path)["/dev/shm"]
    assert little.state == "missing" and "--shm-size" in little.remedy


def test_a_metrics_port_in_use_is_told(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", free_port()))
        taken.listen()
        monkeypatch.setattr(machine, "METRICS_PORT", taken.getsockname()[1])
        found = of_machine(tmp_path)["metrics port"]
    assert found.state == "ok" and "is taken" in found.detail and "next free one" in found.detail
    assert of_machine(tmp_path)["metrics port"].state == "ok", "the port was given back"


def states(said: str) -> dict[str, str]:
    """State of each finding by its name."""
    return {line[1]: line[2] for line in re.finditer(r"^ (\S[^\n]*?) +(ok|missing|no|unknown) ", said, re.M)}


def test_a_job_is_looked_at_by_what_run_refuses_it_for(yaongi, monkeypatch, tmp_path):
    def full() -> None:
        raise VolumeError("a volume is full; make room")

    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    code, said, _ = yaongi("doctor", "tiny")
    assert code == 0 and states(said)["cluster"] == "missing", "it runs here, without a cluster"
    assert {states(said)[what] for what in ("ports", "memory", "time", "disk")} == {"ok"}

    monkeypatch.setattr(refusals, "checks", lambda job, changes: {"volumes": full})
    code, said, _ = yaongi("doctor", "tiny")
    assert code == 1 and states(said)["volumes"] == "no" and "a volume is full; make room" in said
    assert yaongi("run", "tiny")[0] == yaongi("local", "tiny")[0] == 74
    taken = tmp_path / "taken"
    taken.touch()
    code, said, _ = yaongi("doctor", "tiny", "--workdir", str(taken))
    assert code == 1 and states(said)["job"] == "no" and "--workdir" in said


@pytest.mark.parametrize("asking", [("--namespace", "mine"), ("--set", "cluster.target=kubernetes")])
def test_a_cluster_that_a_job_is_meant_for_is_needed(yaongi, monkeypatch, asking):
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    code, said, _ = yaongi("doctor", "tiny", *asking)
    assert code == 1 and states(said)["cluster"] == "no"
    assert "memory" not in states(said), "this machine need not hold it"


def test_a_tool_that_is_absent_is_told_with_its_purpose(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert of_machine(tmp_path)["kubectl"].detail == "not in PATH; needed only to apply manifests and look at clusters"


def test_the_key_of_a_judge_is_looked_for_where_a_job_has_one():
    judge = {"url": "https://judge/v1", "model": "m", "questions": "https://h/q.jsonl"}
    asked = load_job("tiny", {"train": {"evaluate": {"judge": judge}}})
    keyless = load_job("tiny", {"train": {"evaluate": {"judge": judge | {"api_key_env": None}}}})

    def found(job, secrets):
        look = SimpleNamespace(namespace="mine", in_namespace=lambda kind, name: secrets.get(name))
        return [(each.state, each.remedy) for each in volumes.judge_secret(look, job)]

    remedy = "kubectl -n mine create secret generic judge --from-file=token=FILE"
    assert found(asked, {}) == found(asked, {"judge": {"data": {"other": "x"}}}) == [("no", remedy)]
    assert found(asked, {"judge": {"data": {"token": "x"}}}) == [("ok", "")]
    assert found(keyless, {}) == found(load_job("tiny"), {}) == found(None, {}) == []


def test_secrets_of_trackers_are_looked_for_where_a_job_has_them():
    job = load_job("tiny", {"train": {"trackers": {"wandb": {"project": "p"}, "mlflow": {"tracking_uri": "http://m"}}}})

    def found(secrets):
        look = SimpleNamespace(namespace="mine", in_namespace=lambda kind, name: secrets.get(name))
        return [(each.state, each.remedy) for each in volumes.tracker_secrets(look, job)]

    wandb = "kubectl -n mine create secret generic wandb --from-file=WANDB_API_KEY=FILE"
    user = "--from-file=MLFLOW_TRACKING_USERNAME=FILE --from-file=MLFLOW_TRACKING_PASSWORD=FILE"
    mlflow = f"kubectl -n mine create secret generic mlflow {user}"
    assert found({}) == [("missing", wandb), ("missing", mlflow)]
    half = {"mlflow": {"data": {"MLFLOW_TRACKING_USERNAME": "x"}}, "wandb": {"data": {"WANDB_API_KEY": "x"}}}
    assert found(half) == [("ok", ""), ("missing", mlflow)]
    assert found({"mlflow": {"data": {"MLFLOW_TRACKING_TOKEN": "x"}}})[1] == ("ok", "")
    look = SimpleNamespace(namespace="mine", in_namespace=lambda kind, name: None)
    assert list(volumes.tracker_secrets(look, load_job("tiny"))) == list(volumes.tracker_secrets(look, None)) == []


def test_a_tracker_without_key_is_a_line_of_doctor_and_run_and_stops_neither(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    changes = {"train": {"trackers": {"wandb": {"project": "p"}, "langfuse": {}}}}
    found = [each for each in machine.of_job("tiny", changes, tmp_path) if each.what == "trackers"]
    assert [each.state for each in found] == ["missing", "missing"]
    assert "set WANDB_API_KEY" in found[0].detail and "set LANGFUSE_PUBLIC_KEY" in found[1].detail
    assert [each for each in machine.of_job("tiny", {}, tmp_path) if each.what == "trackers"] == []
