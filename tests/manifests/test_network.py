"""Which pod may connect to which, by the semantics of the NetworkPolicy API applied to the rendered objects.

The evaluator below is the oracle; no cluster with enforced network policies is needed, and none was tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from manifests import names, netprobe
from manifests.kinds import pod_template
from manifests.network import network_policies
from manifests.render import job_objects
from manifests.spec import JobSpec, job_from

Object = dict[str, Any]
HERE, MONITORING, KUBEFLOW, SYSTEM = "team-a", "monitoring", "kubeflow", "kube-system"


@dataclass(frozen=True)
class Pod:
    """A pod of the cluster, or with an address only, anything else."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.244.0.9"


def rank(job: JobSpec, task: names.Task = "train") -> Pod:
    return Pod(HERE, pod_template(job_objects(job, task))["metadata"]["labels"])


def two_workers(**changes: Any) -> JobSpec:
    return job_from({"preset": "tiny", "name": "mine"}, {"cluster": {"nodes": 2}, **changes})


MINE = two_workers()
OTHER = job_from({"preset": "tiny", "name": "other"}, {"cluster": {"nodes": 2, "job": "trainjob"}})
POLICIES = [
    *network_policies(),
    *(item for job in (MINE, OTHER) for item in job_objects(job) if item["kind"] == "NetworkPolicy"),
]
STEP = Pod(HERE, {names.APP_LABEL: names.STEP_APP})
FETCHING = Pod(HERE, {names.APP_LABEL: names.STEP_APP, names.EGRESS_LABEL: names.HUB})
PROMETHEUS = Pod(MONITORING, {"app": "prometheus"})
DNS = Pod(SYSTEM, {"k8s-app": "kube-dns"})
NODE_LOCAL_DNS = Pod(address="169.254.20.10")
PIPELINES = Pod(KUBEFLOW, {"app": "ml-pipeline"})
NOTEBOOK = Pod(HERE, {"app": "notebook"})
TRAINER = Pod("kubeflow-system", {"app.kubernetes.io/part-of": "kubeflow", "app.kubernetes.io/component": "manager"})
API_SERVER = Pod(address="172.18.0.2")
WEB = Pod(address="203.0.113.7")
WEB_6 = Pod(address="2001:db8::7")


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the evaluator knows no more"
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: Object, own_namespace: str, other: Pod) -> bool:
    if "ipBlock" in peer:
        assert set(peer["ipBlock"]) == {"cidr"}
        return ip_address(other.address) in ip_network(peer["ipBlock"]["cidr"])
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        in_place = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        in_place = other.namespace == own_namespace
    return in_place and selects(peer.get("podSelector", {}), other.labels)


def has_port(rule: Object, port: int, protocol: str) -> bool:
    ports = rule.get("ports", [{"port": port, "protocol": protocol}])
    return any(
        entry.get("protocol", "TCP") == protocol and entry["port"] <= port <= entry.get("endPort", entry["port"])
        for entry in ports
    )


def passes(direction: str, pod: Pod, other: Pod, port: int, protocol: str) -> bool:
    """Whether the policies of `pod` let it talk with `other` in this direction."""
    if not pod.namespace:
        return True
    chosen = [
        policy["spec"]
        for policy in POLICIES
        if pod.namespace == HERE
        and direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    if not chosen:
        return True  # not isolated
    return any(
        has_port(rule, port, protocol)
        and any(is_peer(peer, HERE, other) for peer in rule["from" if direction == "Ingress" else "to"])
        for spec in chosen
        for rule in spec[direction.lower()]
    )


def may_connect(source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    return passes("Egress", source, target, port, protocol) and passes("Ingress", target, source, port, protocol)


@pytest.mark.parametrize("port", [23456, 29500, 41753])
def test_ranks_reach_those_of_their_own_run_at_any_port_and_no_others(port: int) -> None:
    assert may_connect(rank(MINE), rank(MINE), port)
    assert may_connect(rank(OTHER), rank(OTHER), port)
    assert not may_connect(rank(MINE), rank(OTHER), port)
    assert not may_connect(rank(MINE, "evaluate"), rank(MINE), port), "another job of the same run"


def test_ranks_reach_the_status_api_of_trainer_and_nothing_else_of_it() -> None:
    assert may_connect(rank(OTHER), TRAINER, 10443)
    assert not may_connect(rank(OTHER), TRAINER, 9443) and not may_connect(rank(OTHER), PIPELINES, 10443)


@pytest.mark.parametrize("target", [WEB, WEB_6, API_SERVER, PIPELINES, NOTEBOOK, STEP, PROMETHEUS])
def test_ranks_reach_nothing_else(target: Pod) -> None:
    assert not may_connect(rank(MINE), target, 443)


@pytest.mark.parametrize("source", [NOTEBOOK, STEP, FETCHING, PIPELINES, PROMETHEUS, WEB])
def test_nobody_else_reaches_ranks(source: Pod) -> None:
    assert not may_connect(source, rank(MINE), 29500)


@pytest.mark.parametrize("source", [rank(MINE), rank(MINE, "evaluate"), STEP, FETCHING])
@pytest.mark.parametrize("server", [DNS, NODE_LOCAL_DNS])
def test_everybody_may_ask_for_names(source: Pod, server: Pod) -> None:
    assert may_connect(source, server, 53, "UDP") and may_connect(source, server, 53, "TCP")


def test_the_doctors_pods_are_to_policies_what_they_stand_for() -> None:
    made = [
        netprobe.owner(MINE, "image", ""),
        *(netprobe.pod(MINE, role, "i", "", [], {}) for role in ("peer", "stranger")),
    ]
    worker, peer, stranger = (Pod(HERE, item["spec"].get("template", item)["metadata"]["labels"]) for item in made)
    assert may_connect(peer, worker, netprobe.RANK_PORT) and not may_connect(stranger, worker, netprobe.RANK_PORT)
    assert netprobe.ports(MINE) == [netprobe.RANK_PORT, 9400] and may_connect(stranger, worker, 9400)
    assert not may_connect(peer, API_SERVER, 443) and may_connect(stranger, API_SERVER, 443)


def test_metrics_are_scraped_at_their_ports_only() -> None:
    eight = job_from({"preset": "h100-4b"}, {"cluster": {"gpus_per_node": 8}})
    (policy,) = [item for item in job_objects(eight) if item["kind"] == "NetworkPolicy"]
    POLICIES.append(policy)
    assert [may_connect(PROMETHEUS, rank(eight), port) for port in (9399, 9400, 9407, 9408)] == [
        False,
        True,
        True,
        False,
    ]
    assert may_connect(PROMETHEUS, rank(MINE), 9400) and not may_connect(PROMETHEUS, rank(MINE), 9401)
    assert not may_connect(WEB, rank(MINE), 9400)
    assert may_connect(PROMETHEUS, STEP, names.STEP_METRICS_PORT) and not may_connect(PROMETHEUS, STEP, 22)


def test_a_run_without_metrics_opens_no_port() -> None:
    silent = two_workers(train={"runtime": {"metrics_port": 0}})
    (policy,) = [item for item in job_objects(silent) if item["kind"] == "NetworkPolicy"]
    assert len(policy["spec"]["ingress"]) == 1


@pytest.mark.parametrize("step", [STEP, FETCHING])
@pytest.mark.parametrize(
    ("target", "port"),
    [(PIPELINES, 8887), (Pod(KUBEFLOW, {"app": "metadata-grpc"}), 8080), (Pod(KUBEFLOW, {"app": "seaweedfs"}), 9000),
     (API_SERVER, 443), (API_SERVER, 6443)],
)  # fmt: skip
def test_steps_reach_what_kubeflow_pipelines_needs(step: Pod, target: Pod, port: int) -> None:
    assert may_connect(step, target, port)


@pytest.mark.parametrize("web", [WEB, WEB_6])
def test_only_steps_that_fetch_data_reach_the_web(web: Pod) -> None:
    assert may_connect(FETCHING, web, 443) and not may_connect(FETCHING, web, 22)
    assert not may_connect(STEP, web, 443)


def test_pods_that_are_not_ours_are_left_alone() -> None:
    driver = Pod(HERE, {"pipelines.kubeflow.org/v2_component": "true"})
    for target in (WEB, API_SERVER, PIPELINES):
        assert may_connect(driver, target, 443)
    assert may_connect(PIPELINES, driver, 8080)


def test_a_public_api_server_can_be_named() -> None:
    step = network_policies(["203.0.113.7/32"])[1]
    assert {"ipBlock": {"cidr": "203.0.113.7/32"}} in step["spec"]["egress"][0]["to"]


def test_without_the_namespaces_policies_a_jobs_own_restricts_no_egress() -> None:
    (policy,) = [item for item in job_objects(MINE) if item["kind"] == "NetworkPolicy"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
