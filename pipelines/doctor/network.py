"""Whether the cluster's network enforces our policies: pods try what must pass and what must not."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.cluster import netprobe
from components.cluster.look import Look
from components.cluster.netprobe import OPEN, SAID
from components.diagnose.explain import exit_of, obstacle
from components.plan.admissible import refusals
from manifests import netprobe as objects
from manifests.kinds import Object
from manifests.names import APP, RUN_LABEL, job_name
from manifests.spec import JobSpec, job_from
from pipelines.doctor.findings import Finding
from trainer.errors import LaunchError

PATIENCE_SECONDS = 120  # for a pod to start, its image included, and to end
DNS_NAME, API_PORT = "kubernetes.default.svc", 443
WEB = ("huggingface.co", 443)  # what only the steps that download may reach
# Of this account, to make and read what is needed here.
RIGHTS: list[Object] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "delete"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["create", "list"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "list"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
]
POLICIES = (
    "helm install yaongi charts/yaongi -n NAMESPACE, or kubectl apply -n NAMESPACE -f manifests/base/networkpolicy.yaml"
)


@dataclass(frozen=True)
class Came:
    """What two pods found: by name of the target `open`, or the error.

    Attributes:
        peer: of a second worker of the job; stranger: of a pod that is none.
        is_installed: whether the namespace has the policy of all workers, which limits what they may reach.
    """

    peer: dict[str, str]
    stranger: dict[str, str]
    is_installed: bool


def findings(look: Look, image: str) -> Iterator[Finding]:
    """Make the pods, judge what they found, and delete everything, whatever happens.

    Raises:
        LaunchError: the cluster refuses an object, or the pods do not start or end in time.
    """
    if lacking := refusals(look, RIGHTS):
        detail = f"not tried: this account may not {', '.join(lacking)} in namespace '{look.namespace}'"
        yield Finding("network", "unknown", detail, "run it as an account that may, such as an administrator's")
        return
    yield from judged(_tried(look, image))


def judged(came: Came) -> Iterator[Finding]:
    """The table: what must pass, what must not, and whether policies have any effect."""
    peer, stranger = came.peer, came.stranger
    passes = peer["rank"] == OPEN
    must = "look at the policies of the namespace (kubectl get networkpolicy) and at its default-deny"
    yield _passes("rank to rank", peer["rank"], "workers of a job reach each other", must)
    yield _passes("DNS", peer["dns"], "workers resolve names", must)
    if "metrics" in stranger:
        remedy = "Prometheus could not scrape workers; a default-deny of the namespace, or a policy of the cluster?"
        yield _passes("metrics", stranger["metrics"], "other pods reach the metrics of workers", remedy, "missing")
    enforces = passes and stranger["rank"] != OPEN
    if enforces:
        yield Finding("enforcement", "ok", f"a stranger's pod is kept from a worker ({stranger['rank']})")
    elif passes:
        detail = "the network does not enforce policies: a stranger's pod reached a worker's port for ranks"
        remedy = (
            "use a network plugin that enforces NetworkPolicy (Calico, Cilium, …); until then all pods reach workers"
        )
        yield Finding("enforcement", "missing", detail, remedy)
    else:
        yield Finding("enforcement", "unknown", "not even a worker of the same job reached the port")
    for name, place in (("api", "the API server"), ("web", f"{WEB[0]}:{WEB[1]}")):
        yield _kept_from(place, peer[name], stranger[name], came.is_installed, enforces=enforces)


def _passes(what: str, came: str, good: str, remedy: str, state: str = "no") -> Finding:
    if came == OPEN:
        return Finding(what, "ok", good)
    return Finding(what, "missing" if state == "missing" else "no", f"blocked: {came}", remedy)


def _kept_from(place: str, worker: str, stranger: str, is_installed: bool, *, enforces: bool) -> Finding:
    what = f"worker to {place}"
    if stranger != OPEN:
        return Finding(what, "unknown", f"no pod here reaches it ({stranger}), which says nothing of policies")
    if not is_installed:
        detail = f"open: the namespace has no policy '{APP}', which limits what workers may reach"
        return Finding(what, "missing", detail, POLICIES)
    if worker != OPEN:
        return Finding(what, "ok", f"kept from it ({worker}), which other pods reach")
    if not enforces:
        return Finding(what, "missing", "open, as policies have no effect")
    detail = (
        "open, although other policies have an effect; the network may not enforce egress, or another policy allows it"
    )
    return Finding(what, "no", detail, "kubectl describe networkpolicy")


def _tried(look: Look, image: str) -> Came:
    job = job_from({"preset": "tiny", "name": f"doctor-{uuid.uuid4().hex[:6]}"}, {"cluster": {"nodes": 2}})
    program = Path(netprobe.__file__).read_text(encoding="utf-8")
    policies = look.items(_path(look, "networking.k8s.io/v1", "networkpolicies"))
    is_installed = any(each["metadata"]["name"] == APP for each in policies)
    try:
        made = look.post(_path(look, "batch/v1", "jobs"), objects.owner(job, image, program))
        owner = {"apiVersion": "batch/v1", "kind": "Job", **{key: made["metadata"][key] for key in ("name", "uid")}}
        look.post(_path(look, "networking.k8s.io/v1", "networkpolicies"), objects.policy(job, owner))
        worker = _waited(look, job, "worker", "Running", image)
        address, (rank, *metrics) = worker["status"]["podIP"], objects.ports(job)
        targets: dict[objects.Role, dict[str, tuple[str, int, bool]]] = {
            "peer": {
                "rank": (address, rank, True),
                "dns": (DNS_NAME, 0, True),
                "api": ("", API_PORT, not is_installed),
                "web": (*WEB, not is_installed),
            },
            "stranger": {
                "rank": (address, rank, False),
                "api": ("", API_PORT, True),
                "web": (*WEB, True),
                **({"metrics": (address, metrics[0], True)} if metrics else {}),
            },
        }
        for role, wanted in targets.items():
            arguments = ["try", json.dumps(wanted)]
            look.post(_path(look, "v1", "pods"), objects.pod(job, role, image, program, arguments, owner))
        peer, stranger = (_said(look, _waited(look, job, role, "Succeeded", image)) for role in targets)
        return Came(peer, stranger, is_installed)
    finally:
        with suppress(LaunchError):  # it deletes itself some minutes later
            look.delete(f"{_path(look, 'batch/v1', 'jobs')}/{job_name(job)}")


def _waited(look: Look, job: JobSpec, role: objects.Role, phase: str, image: str) -> Object:
    """The pod of this role once it is in this phase.

    Raises:
        LaunchError: it is not in time, or it has failed.
    """
    deadline, pod = time.monotonic() + PATIENCE_SECONDS, None
    selector = f"labelSelector={RUN_LABEL}%3D{job.run_name},{objects.ROLE_LABEL}%3D{role}"
    while time.monotonic() < deadline:
        pod = next(iter(look.items(f"{_path(look, 'v1', 'pods')}?{selector}")), None)
        if pod and pod["status"].get("phase") in (phase, "Failed"):
            break
        time.sleep(1)
    if pod and pod["status"].get("phase") == phase:
        return pod
    blocked = obstacle(pod) if pod else None
    ended = exit_of(pod) if pod else None
    why = str(blocked) if blocked else ended.describe() if ended else f"it is not {phase} after {PATIENCE_SECONDS} s"
    raise LaunchError(f"the pod '{role}' of the check ({image}; YAONGI_PIPELINE_IMAGE names another): {why}")


def _said(look: Look, pod: Object) -> dict[str, str]:
    """What the pod has printed."""
    lines = look.cluster.log_tail(pod["metadata"]["name"], 1)
    try:
        return dict(json.loads(lines[-1].removeprefix(SAID)))
    except (IndexError, ValueError):
        raise LaunchError(f"the log of pod '{pod['metadata']['name']}' of the check cannot be read") from None


def _path(look: Look, api: str, plural: str) -> str:
    return f"/{'api' if api == 'v1' else 'apis'}/{api}/namespaces/{look.namespace}/{plural}"
