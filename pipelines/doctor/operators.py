"""Which operators the cluster has, their versions, and whether they run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from components.cluster.api import Refused
from components.cluster.look import Look
from components.plan.admissible import serves
from manifests.kinds import PYTORCHJOB, TRAINJOB, JobKind, Object
from pipelines.doctor.findings import Finding, told
from trainer.errors import in_words

Version = tuple[int, int]


@dataclass(frozen=True)
class Operator:
    """`image`: last part of its image's name. Versions from `least` up to, not including, `below` are known to work.

    Attributes:
        unknown: what another version may do.
        lacks: known version → what it lacks that newer ones have.
    """

    kind: JobKind
    image: str
    least: Version
    below: Version
    install: str
    unknown: str = "this one may refuse jobs"
    lacks: Mapping[Version, str] = field(default_factory=dict)


TRAINING_OPERATOR = Operator(
    PYTORCHJOB,
    "training-operator",
    (1, 9),
    (2, 0),
    'kubectl apply --server-side -k "github.com/kubeflow/trainer.git/manifests/overlays/standalone?ref=v1.9.4"',
)
TRAINER = Operator(
    TRAINJOB,
    "trainer",
    (2, 1),
    (2, 4),
    'kubectl apply --server-side -k "https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.3.0"',
    "this one may lack fields of our TrainJobs (they are then refused by name) or understand them otherwise",
    {(2, 1): "TrainJobs have no deadline of their own and show no progress, and in a queue of Kueue 0.17 never start"},
)
# Readable by every account, and there from 2.2 on.
TRAINER_VERSION = ("kubeflow-trainer-public", "kubeflow_trainer_version")
OPERATORS = (TRAINING_OPERATOR, TRAINER)


def job_kinds(look: Look, wanted: JobKind | None) -> Iterator[Finding]:
    """The kinds of training job. One of them is needed: `wanted`, if a job says which."""
    served = {operator.kind for operator in OPERATORS if serves(look, operator.kind)}
    for operator in OPERATORS:
        kind = operator.kind
        if kind not in served:
            needed = kind is wanted or (wanted is None and not served)
            detail = f"the cluster knows no {kind.kind} ({kind.api_version})"
            yield Finding(kind.kind, "no" if needed else "missing", detail, operator.install)
            continue
        yield Finding(kind.kind, "ok", f"served as {kind.api_version}")
        yield from told(f"{kind.kind} operator", partial(_running, look, operator))


def monitoring(look: Look) -> Iterator[Finding]:
    """The Prometheus operator, which is optional."""
    if look.get("/apis/monitoring.coreos.com/v1") is None:
        remedy = "install the Prometheus operator (kube-prometheus-stack), or scrape ports 9400 and up by annotations"
        yield Finding("monitoring", "missing", "no PodMonitor: nothing scrapes the metrics automatically", remedy)
    else:
        yield Finding("monitoring", "ok", "the Prometheus operator's kinds are there")


def pipelines(host: str) -> Iterator[Finding]:
    """Kubeflow Pipelines; only `yaongi submit` needs it."""
    import urllib3

    if not host:
        yield Finding(
            "Kubeflow Pipelines", "missing", "KFP_HOST is not set; needed only to submit", "export KFP_HOST=http://…"
        )
        return
    if not host.startswith(("http://", "https://")):
        yield Finding("Kubeflow Pipelines", "no", f"KFP_HOST is '{host}'", "begin it with http:// or https://")
        return
    try:
        answer = urllib3.request("GET", f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=5.0, retries=False)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        yield Finding(
            "Kubeflow Pipelines",
            "no",
            f"{host} does not answer ({in_words(error)})",
            "check KFP_HOST, or port-forward it",
        )
        return
    good = answer.status == 200
    yield Finding("Kubeflow Pipelines", "ok" if good else "no", f"{host} answers {answer.status}")


def _running(look: Look, operator: Operator) -> Iterator[Finding]:
    what = f"{operator.kind.kind} operator"
    try:
        deployments = look.items("/apis/apps/v1/deployments")
    except Refused:
        if operator is not TRAINER or not (version := _published(look, "kubeflow-system")):
            raise
        yield _judged(operator, f"this account may not look for it, but it says that it is {version}", version)
        return
    for deployment in deployments:
        image = next(
            (i for i in _images(deployment) if _base(i) in (operator.image, f"{operator.image}-controller-manager")), ""
        )
        if not image:
            continue
        place = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
        if not deployment["status"].get("readyReplicas"):
            yield Finding(
                what, "no", f"{place} ({image}) is not ready", f"kubectl -n {place.replace('/', ' describe deploy ')}"
            )
            return
        version = _published(look, deployment["metadata"]["namespace"]) if operator is TRAINER else ""
        yield _judged(operator, f"{place} runs {image}", version or image.rpartition(":")[2])
        return
    yield Finding(
        what, "no", "no deployment of it in any namespace: jobs would be accepted and never run", operator.install
    )


def _judged(operator: Operator, detail: str, written: str) -> Finding:
    """What a version means for jobs."""
    what, numbers = f"{operator.kind.kind} operator", re.match(r"v?(\d+)\.(\d+)", written)
    version = (int(numbers[1]), int(numbers[2])) if numbers else None
    if version is None or not operator.least <= version < operator.below:
        known = f"{_text(operator.least)} up to {_text(operator.below)} (not included)"
        return Finding(what, "missing", detail, f"use a version from {known}; {operator.unknown}")
    lacks = operator.lacks.get(version, "")
    return Finding(what, "ok", f"{detail}; {lacks}" if lacks else detail)


def _published(look: Look, namespace: str) -> str:
    """The version that Trainer tells everybody; "" if it does not."""
    name, key = TRAINER_VERSION
    try:
        found = look.get(f"/api/v1/namespaces/{namespace}/configmaps/{name}") or {}
    except Refused:
        return ""
    return found.get("data", {}).get(key, "")


def _images(deployment: Object) -> list[str]:
    return [container["image"] for container in deployment["spec"]["template"]["spec"]["containers"]]


def _base(image: str) -> str:
    return image.rpartition("/")[2].partition(":")[0].partition("@")[0]


def _text(version: Version) -> str:
    return ".".join(map(str, version))
