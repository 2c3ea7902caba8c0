"""Network policies. They are additive: a selected pod may do what all policies together allow, and nothing else.

`network_policies` is for a namespace; `worker_policy` is per job, because a policy cannot select "pods with the same
label value". Pods without our labels, such as those of Kubeflow Pipelines itself, are not affected.
"""

from __future__ import annotations

from collections.abc import Sequence

from manifests.kinds import Object
from manifests.names import (
    APP,
    APP_LABEL,
    EGRESS_LABEL,
    HUB,
    INSTANCE_LABEL,
    SERVER_APP,
    STEP_APP,
    STEP_METRICS_PORT,
    Task,
    job_name,
)
from manifests.objects import metrics_ports, trackers
from manifests.spec import JobSpec

# Addresses of a cluster's API server and services, unless they are public (RFC 1918, 6598, 4193).
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
EVERYWHERE = ("0.0.0.0/0", "::/0")
NODE_LOCAL_DNS = "169.254.20.10/32"
DNS_PORTS = (53, 5353)  # OpenShift's DNS pods listen on the second
WEB_PORTS = (80, 443)
ANY_POD: Object = {"namespaceSelector": {}}
# The pods of Kubeflow Trainer by the labels of its manifests and of its chart; they take a TrainJob's progress.
TRAINER = {"app.kubernetes.io/part-of": "kubeflow", "app.kubernetes.io/component": "manager"}
TRAINER_STATUS_PORT = 10443


def network_policies(private: Sequence[str] = PRIVATE) -> list[Object]:
    """Workers may reach only each other, DNS and Trainer's status API; pipeline steps the cluster; download steps also
    the web.

    Args:
        private: address ranges of the API server and other services that steps need, such as an object store.
    """
    workers, steps, hub = {APP_LABEL: APP}, {APP_LABEL: STEP_APP}, {EGRESS_LABEL: HUB}
    scrape = {"from": [ANY_POD], "ports": [_port(STEP_METRICS_PORT)]}
    return [
        # Each job's own policy allows its workers; this one allows nobody.
        _policy(APP, workers, ingress=[], egress=_worker_egress()),
        _policy(STEP_APP, steps, ingress=[scrape], egress=[{"to": [ANY_POD, *map(_block, private)]}, _dns()]),
        _policy(
            f"{STEP_APP}-{HUB}",
            hub,
            egress=[{"to": [_block(cidr) for cidr in EVERYWHERE], "ports": [_port(number) for number in WEB_PORTS]}],
        ),
    ]


def server_policy(*ports: int) -> Object:
    """Servers of exported models answer the cluster's pods, and reach nothing themselves."""
    answers = {"from": [ANY_POD], "ports": [_port(port) for port in ports]}
    return _policy(SERVER_APP, {APP_LABEL: SERVER_APP}, ingress=[answers], egress=[])


def default_deny() -> Object:
    """Denies all traffic of every pod in a namespace, ours or not, except what other policies allow."""
    return _policy("yaongi-default-deny", {}, ingress=[], egress=[])


def worker_policy(job: JobSpec, task: Task) -> Object:
    """The spec of a job's own policy: its workers can reach each other, and scrapers their metrics ports.

    It does not restrict egress, so that it is harmless where the other policies are not installed. Except for a tracker
    at a port other than the web's: then it allows that port, and what workers may reach anyway.
    """
    own = {"matchLabels": {INSTANCE_LABEL: job_name(job, task)}}
    ingress: list[Object] = [{"from": [{"podSelector": own}]}]
    if ports := metrics_ports(job, task):
        ingress.append({"from": [ANY_POD], "ports": [_port(port["containerPort"]) for port in ports]})
    policy = {"podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress}
    named = job.train.trackers if trackers(job, task) else None
    if named and (others := sorted(named.ports - set(WEB_PORTS))):
        egress = [*_worker_egress(), {"ports": [_port(number) for number in (*WEB_PORTS, *others)]}]
        policy |= {"policyTypes": ["Ingress", "Egress"], "egress": egress}
    return policy


def _worker_egress() -> list[Object]:
    """What all workers may reach: each other, Trainer's status API, DNS."""
    status = {"to": [ANY_POD | {"podSelector": {"matchLabels": TRAINER}}], "ports": [_port(TRAINER_STATUS_PORT)]}
    return [{"to": [{"podSelector": {"matchLabels": {APP_LABEL: APP}}}]}, status, _dns()]


def _dns() -> Object:
    return {
        "to": [ANY_POD, _block(NODE_LOCAL_DNS)],
        "ports": [_port(number, protocol) for number in DNS_PORTS for protocol in ("UDP", "TCP")],
    }


def _policy(name: str, labels: dict[str, str], **rules: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "yaongi"}},
        "spec": {
            "podSelector": {"matchLabels": labels} if labels else {},
            "policyTypes": [direction.capitalize() for direction in rules],
            **rules,
        },
    }


def _block(cidr: str) -> Object:
    return {"ipBlock": {"cidr": cidr}}


def _port(number: int, protocol: str = "TCP") -> Object:
    return {"port": number, "protocol": protocol}
