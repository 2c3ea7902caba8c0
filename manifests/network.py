"""Who may talk to whom. Policies add up: a pod that any of them selects may do what they allow together, and no more.

`network_policies` is for a namespace, `worker_policy` belongs to one job, since a policy cannot say "pods with my own
label". Pods without our labels, those of Kubeflow Pipelines itself for instance, are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from manifests.kinds import Object
from manifests.names import (
    APP,
    APP_LABEL,
    EGRESS_LABEL,
    HUB,
    STEP_APP,
    STEP_METRICS_PORT,
    Task,
    job_name,
)
from manifests.objects import metrics_ports
from manifests.spec import JobSpec

# Where a cluster's API server and services are, unless they have public addresses (RFC 1918, 6598, 4193).
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
EVERYWHERE = ("0.0.0.0/0", "::/0")
NODE_LOCAL_DNS = "169.254.20.10/32"
DNS_PORTS = (53, 5353)  # OpenShift's DNS pods listen on the second
WEB_PORTS = (80, 443)
ANY_POD: Object = {"namespaceSelector": {}}


def network_policies(private: Sequence[str] = PRIVATE) -> list[Object]:
    """Workers reach each other and DNS only; the pipeline's steps the cluster, and those that fetch data the web too.

    Args:
        private: address ranges of the API server and of whatever else steps need, an object store for instance.
    """
    workers, steps, hub = {APP_LABEL: APP}, {APP_LABEL: STEP_APP}, {EGRESS_LABEL: HUB}
    dns = {
        "to": [ANY_POD, _block(NODE_LOCAL_DNS)],
        "ports": [_port(number, protocol) for number in DNS_PORTS for protocol in ("UDP", "TCP")],
    }
    scrape = {"from": [ANY_POD], "ports": [_port(STEP_METRICS_PORT)]}
    return [
        # Each job's own policy lets its workers in; from here nobody is.
        _policy(APP, workers, ingress=[], egress=[{"to": [{"podSelector": {"matchLabels": workers}}]}, dns]),
        _policy(STEP_APP, steps, ingress=[scrape], egress=[{"to": [ANY_POD, *map(_block, private)]}, dns]),
        _policy(
            f"{STEP_APP}-{HUB}",
            hub,
            egress=[{"to": [_block(cidr) for cidr in EVERYWHERE], "ports": [_port(number) for number in WEB_PORTS]}],
        ),
    ]


def default_deny() -> Object:
    """Closes every pod of a namespace, ours or not, but for what other policies allow it."""
    return _policy("yaongi-default-deny", {}, ingress=[], egress=[])


def worker_policy(job: JobSpec, task: Task) -> Object:
    """The spec of a job's own policy: its workers are reached by each other, and at their metrics ports by scrapers.

    It says nothing about egress, so that it does no harm where nothing else of this is installed.
    """
    own = {"matchLabels": {"app.kubernetes.io/instance": job_name(job, task)}}
    ingress: list[Object] = [{"from": [{"podSelector": own}]}]
    if ports := metrics_ports(job, task):
        ingress.append({"from": [ANY_POD], "ports": [_port(port["containerPort"]) for port in ports]})
    return {"podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress}


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
