"""What `plan` refuses of a cluster, with the API's answers; tests/e2e_kfp has a real cluster's."""

from __future__ import annotations

from typing import Any

import pytest

from components.cluster.api import Refused
from components.plan.admissible import image_problems, needed_rules, problems, requests
from manifests.kinds import PYTORCHJOB, TRAINJOB
from manifests.spec import load_job


class Answers:
    """An API server of one namespace `team` where everything is there, except what a test takes away."""

    namespace = "team"

    def __init__(self, **changes: Any) -> None:
        node = {
            "metadata": {"labels": {"kubernetes.io/hostname": "a"}},
            "spec": {},
            "status": {
                "allocatable": {"cpu": "4", "memory": "16Gi"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        self.nodes, self.denied, self.kinds, self.absent, self.blind = [node], set(), {PYTORCHJOB.plural}, set(), False
        self.paths = {"/api/v1/namespaces/team": {}}
        self.asked: list[tuple[str, str]] = []
        vars(self).update(changes)

    def get(self, path: str) -> Any:
        if path.startswith(f"/apis/{PYTORCHJOB.api_version}"):
            return {"resources": [{"name": name} for name in self.kinds]}
        return self.paths.get(path)

    def items(self, path: str) -> Any:
        if self.blind:
            raise Refused(403, "this account may not read nodes")
        return self.nodes

    def in_namespace(self, resource: str, name: str) -> Any:
        return None if name in self.absent else {"status": {"phase": "Pending"}}

    def post(self, path: str, body: Any) -> Any:
        wanted = body["spec"]["resourceAttributes"]
        assert wanted["namespace"] == "team"
        self.asked.append((wanted["verb"], wanted["resource"]))
        return {"status": {"allowed": (wanted["verb"], wanted["resource"]) not in self.denied}}


def found(answers: Answers, **cluster: Any) -> list[str]:
    return list(problems(load_job("tiny", {"cluster": cluster}), answers))  # type: ignore[arg-type]  what it reads of it


def test_a_cluster_that_has_all_is_no_problem_and_only_needed_rights_are_asked():
    answers = Answers()
    assert found(answers) == []
    assert ("create", "pytorchjobs") in answers.asked and ("delete", "configmaps") in answers.asked
    assert not {"trainjobs", "trainingruntimes"} & {resource for _, resource in answers.asked}


def test_every_lack_is_one_line_and_they_are_told_together():
    answers = Answers(denied={("delete", "configmaps")}, absent={"llm-datasets-pvc"}, kinds=set())
    image, kind, rights, claim, size = found(answers, image="Registry/Trainer:1", cpus_per_node=64)
    assert image.startswith("cluster.image: 'Registry/Trainer:1' is no image reference; ")
    assert kind.startswith("cluster.job: the cluster knows no PyTorchJob (kubeflow.org/v1); install ")
    assert rights == (
        "this account may not delete configmaps in namespace 'team'; grant it with: "
        "python -m manifests.generate rbac team | kubectl apply -f -"
    )
    assert claim.startswith("storage.datasets_pvc: claim 'llm-datasets-pvc' does not exist in namespace 'team'; ")
    assert "a worker (cpu 64, memory 3 GiB" in size and "none has enough cpu" in size
    assert all("\n" not in line for line in (image, kind, rights, claim, size))


def test_a_queue_that_does_not_exist_is_told_before_anything_is_prepared():
    answers = Answers()
    assert found(answers, queue="gpus") == [], "without Kueue nobody reads the label"
    answers.paths["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v1beta2"}, {"version": "v1beta1"}]}
    (said,) = found(answers, queue="gpus")
    assert said.startswith("cluster.queue: namespace 'team' has no LocalQueue 'gpus'; kubectl get localqueues -n team")
    answers.paths["/apis/kueue.x-k8s.io/v1beta2/namespaces/team/localqueues/gpus"] = {}
    assert found(answers, queue="gpus") == []
    (said,) = found(answers, queue="gpus", queue_priority="urgent")
    assert said.startswith("cluster.queue_priority: there is no WorkloadPriorityClass 'urgent'; kubectl get workload")
    answers.paths["/apis/kueue.x-k8s.io/v1beta2/workloadpriorityclasses/urgent"] = {}
    assert found(answers, queue="gpus", queue_priority="urgent") == []
    answers.paths["/apis/kueue.x-k8s.io"] = {"versions": [{"version": "v2"}]}
    assert found(answers, queue="gpus") == [], "nothing is known of such a queue"


def test_an_absent_device_class_is_told_and_one_that_may_not_be_read_is_not():
    answers, devices = Answers(), {"nic.example.com": 8}
    (said,) = found(answers, devices=devices)
    assert said.startswith("cluster.devices: the cluster has no resource.k8s.io/v1, which Kubernetes 1.34 and newer")
    answers.paths["/apis/resource.k8s.io/v1"] = {}
    (said,) = found(answers, devices=devices)
    assert said.startswith("cluster.devices: there is no device class 'nic.example.com'; ")
    answers.paths["/apis/resource.k8s.io/v1/deviceclasses/nic.example.com"] = {}
    assert found(answers, devices=devices) == []

    class MayNot(Answers):
        def get(self, path: str) -> Any:
            if "deviceclasses" in path:
                raise Refused(403, "this account may not read it")
            return super().get(path)

    assert found(MayNot(paths=answers.paths), devices={"other.example.com": 1}) == []


def test_without_the_namespace_nothing_else_is_told():
    assert found(Answers(paths={})) == ["namespace 'team' does not exist; create it or set cluster.namespace"]


def test_sizes_are_not_checked_where_the_account_may_not_list_nodes(capsys):
    assert found(Answers(blind=True), cpus_per_node=64) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the sizes of the nodes are not checked, as this account may not list them")


@pytest.mark.parametrize("labels", [{"cloud.google.com/gke-nodepool": "a"}, {"karpenter.sh/nodepool": "a"}])
def test_a_cluster_that_adds_nodes_is_not_refused(labels, capsys):
    answers = Answers()
    answers.nodes[0]["metadata"]["labels"] = labels
    assert found(answers, gpus_per_node=2, nodes=1) == []
    assert "unless the cluster adds nodes, the job will wait: " in capsys.readouterr().out
    grown = Answers(paths={"/api/v1/namespaces/team": {}, "/apis/karpenter.sh": {}})
    assert found(grown, cpus_per_node=64) == []


def test_devices_that_nodes_do_not_list_make_no_worker_too_big():
    assert found(Answers(), resources={"deviceclass.resource.kubernetes.io/nic.example.com": 8}) == []
    (said,) = found(Answers(), resources={"rdma/hca": 8})
    assert "none has enough rdma/hca" in said


def test_workers_that_each_fit_are_not_refused():
    """Others may end before their turn; the launcher's limits apply."""
    assert found(Answers(), nodes=2, cpus_per_node=3) == []
    (tainted,) = found(Answers(), node_selector={"pool": "x"})
    assert tainted.startswith("none of the 1 nodes is ready, selected and tolerated; ")


def test_a_taint_is_no_reason_where_the_queues_flavor_or_the_api_server_may_tolerate_it():
    answers = Answers()
    answers.nodes[0]["spec"]["taints"] = [{"key": "rdma/ib", "value": "present", "effect": "NoSchedule"}]
    answers.nodes[0]["status"]["allocatable"]["rdma/ib"] = "4"
    assert found(answers) != []
    assert found(answers, queue="gpus") == []
    assert found(answers, resources={"rdma/ib": 1}) == [], "the admission plugin ExtendedResourceToleration"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("", "is empty"),
        ("registry:5000/team/trainer", "has no tag"),
        ("registry/trainer:a b", "is no image reference"),
        ("http://registry/trainer:1", "is no image reference"),
        ("registry/trainer:", "is no image reference"),
        ("registry/-trainer:1", "is no image reference"),
    ],
)
def test_a_wrong_image_reference_is_told(image, said):
    (problem,) = image_problems(image)
    assert said in problem


@pytest.mark.parametrize(
    "image",
    [
        "localhost/yaongi-trainer:0.1.0",
        "nvcr.io/nvidia/pytorch:25.06-py3",
        "[2001:db8::1]:5000/a/b_c/d-e__f:V1_x",
        "registry.example:443/trainer@sha256:" + "0" * 64,
        "trainer:1@sha256:" + "a" * 64,
    ],
)
def test_right_image_references_are_taken(image):
    assert list(image_problems(image)) == []


def test_a_pod_asks_for_what_its_manifest_says():
    job = load_job("h100-4b", {"cluster": {"gpus_per_node": 8, "resources": {"rdma/ib": 2}}})
    wanted = requests(job)
    assert wanted["nvidia.com/gpu"] == 8 and wanted["rdma/ib"] == 2
    assert wanted["memory"] == int(job.cluster.memory_gib_per_node * 2**30)
    google = {"gpus_per_node": 8, "nodes": 2, "annotations": {"networking.gke.io/interfaces": "[]"}}
    plain, beside = (requests(load_job("h100-4b", {"cluster": google | more})) for more in ({}, {"fabric": "tcpx"}))
    assert (beside["cpu"] - plain["cpu"], beside["memory"] - plain["memory"]) == (1, 2 * 2**30), "the fabric's daemon"
    rules = needed_rules(load_job("tiny", {"cluster": {"job": "trainjob"}}))
    named = {name for rule in rules for name in rule["resources"]}
    assert {TRAINJOB.plural, "trainingruntimes", "configmaps"} <= named and PYTORCHJOB.plural not in named
