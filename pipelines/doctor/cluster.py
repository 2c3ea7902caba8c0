"""What a cluster has and lacks for a run, as far as this account may read it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from components.cluster.api import Cluster, Refused
from components.cluster.look import Look
from components.images import PIPELINE_IMAGE
from components.plan.admissible import requests
from manifests.clusterspec import ClusterSpec, StorageSpec
from manifests.kinds import Object
from manifests.names import kind
from manifests.spec import JobSpec
from pipelines.doctor import capacity, network, operators, permissions, queues, volumes
from pipelines.doctor.findings import Finding, told
from trainer.errors import LaunchError

OLDEST_KUBERNETES = (1, 28)  # has sidecars, and is the oldest version in the operator's own tests
MOST_SKEW_SECONDS = 10.0
ENFORCE = "pod-security.kubernetes.io/enforce"


def findings(namespace: str | None, job: JobSpec | None, *, is_asked: bool) -> Iterator[Finding]:
    """All findings about the cluster of KUBECONFIG.

    Args:
        is_asked: whether the user wants to run on the cluster; if not, a "no" becomes "missing".
    """
    for finding in _connected(namespace, job):
        lenient = finding.state == "no" and not is_asked
        yield replace(finding, state="missing") if lenient else finding


def of_network(namespace: str | None, job: JobSpec | None) -> Iterator[Finding]:
    """What the pods of `yaongi doctor --network` find."""

    def look() -> Iterator[Finding]:
        cluster = Cluster.connect(namespace or (job.cluster.namespace if job else None))
        return network.findings(Look(cluster), PIPELINE_IMAGE)

    return told("network", look)


def _connected(namespace: str | None, job: JobSpec | None) -> Iterator[Finding]:
    try:
        cluster = Cluster.connect(namespace or (job.cluster.namespace if job else None))
        yield from examine(cluster, job)
    except LaunchError as error:
        yield Finding("cluster", "no", str(error))


def examine(cluster: Cluster, job: JobSpec | None) -> Iterator[Finding]:
    """All findings about one namespace of a cluster, and about the needs of `job` if one is given.

    Raises:
        LaunchError: the API server cannot be reached.
    """
    look = Look(cluster)
    version = look.get("/version") or {}
    wanted, storage = (job.cluster, job.storage) if job else (ClusterSpec(), StorageSpec())
    yield _version(look, version)
    if not _exists(look):
        remedy = f"kubectl create namespace {look.namespace}, or choose another with --namespace"
        yield Finding("namespace", "no", f"'{look.namespace}' does not exist", remedy)
        return
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "clock": partial(_clock, look),
        "namespace": partial(_namespace, look),
        "permissions": partial(permissions.permissions, look),
        "service account": partial(permissions.accounts, look),
        "training operators": partial(operators.job_kinds, look, kind(job) if job else None),
        "claims": partial(volumes.claims, look, storage, wanted.nodes),
        "nodes": partial(_nodes, look, job),
        "device class": partial(capacity.devices, look, wanted),
        "Kueue": partial(queues.queues, look, wanted, requests(job) if job else {}),
        "monitoring": partial(operators.monitoring, look),
        "secret": partial(volumes.secret, look, wanted.hub_secret),
        "judge": partial(volumes.judge_secret, look, job),
        "trackers": partial(volumes.tracker_secrets, look, job),
        "network policies": partial(_network, look),
        "image": partial(_image, wanted),
        "Kubeflow Pipelines": partial(operators.pipelines, os.environ.get("KFP_HOST", "")),
    }
    for what, check in checks.items():
        yield from told(what, check)


def _version(look: Look, version: Object) -> Finding:
    number = re.match(r"v(\d+)\.(\d+)", version.get("gitVersion", ""))
    known = number is not None and (int(number[1]), int(number[2])) >= OLDEST_KUBERNETES
    remedy = "" if known else "use 1.28 or newer; older versions lack what the operators rely on"
    detail = f"{look.cluster.server}, Kubernetes {version.get('gitVersion', 'unknown')}"
    return Finding("cluster", "ok" if known else "missing", detail, remedy)


def _clock(look: Look) -> Iterator[Finding]:
    skew = look.clock_skew_seconds()
    if skew is None:
        yield Finding("clock", "unknown", "the API server sends no date")
        return
    good = abs(skew) <= MOST_SKEW_SECONDS
    detail = f"this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the API server"
    remedy = "" if good else "set both by NTP: pods compare the time in a launcher's lease with their own clock"
    yield Finding("clock", "ok" if good else "no", detail if abs(skew) >= 1 else "agrees with the API server's", remedy)


def _exists(look: Look) -> bool:
    """Whether the namespace exists; assumed where the account may not read it."""
    try:
        return look.get(f"/api/v1/namespaces/{look.namespace}") is not None
    except Refused:
        return True


def _namespace(look: Look) -> Iterator[Finding]:
    labels = (look.get(f"/api/v1/namespaces/{look.namespace}") or {"metadata": {}})["metadata"].get("labels", {})
    level = labels.get(ENFORCE, "nothing")
    yield Finding("namespace", "ok", f"'{look.namespace}', Pod Security enforces {level}; our pods satisfy restricted")


def _nodes(look: Look, job: JobSpec | None) -> Iterator[Finding]:
    nodes = look.items("/api/v1/nodes")
    yield from capacity.gpus(nodes)
    if job:
        yield from capacity.fits(nodes, job.cluster)


def _network(look: Look) -> Iterator[Finding]:
    policies = look.items(f"/apis/networking.k8s.io/v1/namespaces/{look.namespace}/networkpolicies")
    detail = (
        f"{len(policies)} in the namespace; the API does not say whether the cluster enforces them: --network tries"
    )
    yield Finding("network policies", "unknown", detail)


def _image(wanted: ClusterSpec) -> Iterator[Finding]:
    detail = f"{wanted.image} ({wanted.image_pull_policy}); only a pod can tell whether nodes can pull it"
    yield Finding("image", "unknown", detail)
