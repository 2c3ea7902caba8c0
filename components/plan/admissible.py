"""Refuse a job that its cluster cannot run before anything is downloaded: image, kind, rights, claims, nodes.

It mounts no volume, so that absent claims are told here: a pod that mounts one waits for it without a word.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from http import HTTPStatus

from components.cluster.api import ApiUnreachable, Cluster, Refused
from components.cluster.look import Look
from components.plan import nodes
from manifests import queue
from manifests.kinds import DEVICE_CLAIMS, TRAINJOB, JobKind, Object, pod_template
from manifests.lint.place import Place
from manifests.names import kind
from manifests.rbac import RULES
from manifests.render import job_objects
from manifests.spec import JobSpec
from trainer.errors import LaunchError

REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
PAUSES_SECONDS = (1.0, 4.0)  # before the API server is asked again
# The grammar of github.com/distribution/reference: host and port, path, tag, digest.
_HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\])"
_PATH = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?:{_HOST}(?::\d+)?/)?{_PATH}(?:/{_PATH})*(?P<tag>:\w[\w.-]{{0,127}})?(?P<digest>@[a-zA-Z][\w.+-]*:[0-9a-fA-F]{{32,}})?"
)
# Marks of nodes that belong to a group which may have, or be given, others: no node of a size is no reason to refuse.
GROUPS = (
    "karpenter.sh/",
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/nodegroup",
    "kubernetes.azure.com/agentpool",
)
SCALERS = ("/apis/karpenter.sh", "/apis/autoscaling.x-k8s.io", "/apis/cluster.x-k8s.io")


def refuse_inadmissible(job: JobSpec) -> None:
    """Raise if a job that trains on a cluster cannot run there.

    Raises:
        LaunchError: the cluster lacks something or does not answer; one line for each problem.
    """
    if job.cluster.target == "local":
        return
    look = Look(Cluster.connect(job.cluster.namespace))
    for pause in (*PAUSES_SECONDS, None):
        try:
            found = list(problems(job, look))
            break
        except ApiUnreachable:
            if pause is None:
                raise
            time.sleep(pause)
    if found:
        raise LaunchError("\n".join(found))


def problems(job: JobSpec, look: Look) -> Iterator[str]:
    """What keeps the job from running on a cluster, each with its fix."""
    yield from image_problems(job.cluster.image)
    if not _exists(look):
        yield f"namespace '{look.namespace}' does not exist; create it or set cluster.namespace"
        return
    checks: tuple[Callable[[], Iterator[str]], ...] = (
        partial(_kind, job, look),
        partial(_rights, job, look),
        partial(_claims, job, look),
        partial(_queue, job, look),
        partial(_devices, job, look),
        partial(_sizes, job, look),
    )
    for check in checks:
        yield from check()


def image_problems(image: str) -> Iterator[str]:
    """What is wrong with the reference of the trainer's image."""
    found = IMAGE.fullmatch(image)
    if not image:
        yield "cluster.image is empty; name the trainer's image, such as registry.example/yaongi-trainer:0.1.0"
    elif found is None:
        yield f"cluster.image: '{image}' is no image reference; write registry/name:tag, the name in lower case"
    elif not (found["tag"] or found["digest"]):
        yield f"cluster.image: '{image}' has no tag, so that nodes may run different versions; write {image}:TAG"


def refusals(look: Look, rules: list[Object]) -> list[str]:
    """What this account may not do in the namespace, as "verb/verb resource"."""
    refused = []
    for rule in rules:
        for resource in rule["resources"]:
            denied = [verb for verb in rule["verbs"] if not _allowed(look, rule["apiGroups"][0], resource, verb)]
            if denied:
                refused.append(f"{'/'.join(denied)} {resource}")
    return refused


def serves(look: Look, wanted: JobKind) -> bool:
    """Whether the cluster knows a kind of job."""
    found = look.get(f"/apis/{wanted.api_version}") or {}
    return any(resource["name"] == wanted.plural for resource in found.get("resources", []))


def needed_rules(job: JobSpec) -> list[Object]:
    """The launcher's rules without those for kinds that the job does not use."""
    ours = {kind(job).plural} | ({"trainingruntimes"} if kind(job) is TRAINJOB else set())
    ours |= {DEVICE_CLAIMS.plural} if job.cluster.devices else set()
    core = ("", "networking.k8s.io")
    return [rule for rule in RULES if rule["apiGroups"][0] in core or ours & set(rule["resources"])]


def _exists(look: Look) -> bool:
    """Whether the namespace exists; assumed where the account may not read it."""
    try:
        return look.get(f"/api/v1/namespaces/{look.namespace}") is not None
    except Refused:
        return True


def _kind(job: JobSpec, look: Look) -> Iterator[str]:
    wanted = kind(job)
    if not serves(look, wanted):
        other = "pytorchjob" if wanted is TRAINJOB else "trainjob"
        yield (
            f"cluster.job: the cluster knows no {wanted.kind} ({wanted.api_version}); install {wanted.operator}, or "
            f"write {other}"
        )


def _rights(job: JobSpec, look: Look) -> Iterator[str]:
    if refused := refusals(look, needed_rules(job)):
        yield (
            f"this account may not {', '.join(refused)} in namespace '{look.namespace}'; grant it with: "
            f"python -m manifests.generate rbac {look.namespace} | kubectl apply -f -"
        )


def _claims(job: JobSpec, look: Look) -> Iterator[str]:
    for field in ("datasets_pvc", "checkpoints_pvc"):
        name = getattr(job.storage, field)
        try:
            claim = look.in_namespace("persistentvolumeclaims", name)
        except Refused:
            return  # `_rights` has told it
        if claim is None:
            fix = f"kubectl apply -n {look.namespace} -f manifests/base/storage.yaml, or name another"
            yield f"storage.{field}: claim '{name}' does not exist in namespace '{look.namespace}'; {fix}"
        elif claim.get("status", {}).get("phase") == "Lost":
            yield f"storage.{field}: the volume of claim '{name}' is lost; make the claim anew, or name another"


def _queue(job: JobSpec, look: Look) -> Iterator[str]:
    """An absent queue or class is accepted in silence, and the job waits. Not every account may read them."""
    name, priority = job.cluster.queue, job.cluster.queue_priority
    if name is None:
        return
    try:
        served = (look.get(f"/apis/{queue.GROUP}") or {"versions": []})["versions"]
        version = queue.version_of([each["version"] for each in served])
        if version is None:
            return
        api = f"/apis/{queue.GROUP}/{version}"
        if look.get(f"{api}/namespaces/{look.namespace}/localqueues/{name}") is None:
            yield (
                f"cluster.queue: namespace '{look.namespace}' has no LocalQueue '{name}'; kubectl get localqueues -n "
                f"{look.namespace} shows those it has, or have it created"
            )
        if priority and look.get(f"{api}/workloadpriorityclasses/{priority}") is None:
            yield (
                f"cluster.queue_priority: there is no WorkloadPriorityClass '{priority}'; kubectl get "
                "workloadpriorityclasses shows those there are, or have it created"
            )
    except Refused:
        return


def _devices(job: JobSpec, look: Look) -> Iterator[str]:
    """Without its device class a pod waits for ever."""
    api = f"/apis/{DEVICE_CLAIMS.group}/{DEVICE_CLAIMS.version}"
    if job.cluster.devices and look.get(api) is None:
        yield (
            f"cluster.devices: the cluster has no {DEVICE_CLAIMS.group}/{DEVICE_CLAIMS.version}, which Kubernetes 1.34 "
            "and newer serve; use cluster.resources, with the resources of a device plugin"
        )
        return
    for name in job.cluster.devices:
        try:
            found = look.get(f"{api}/deviceclasses/{name}")
        except Refused:
            return  # a right for the whole cluster, which a launcher need not have
        if found is None:
            yield f"cluster.devices: there is no device class '{name}'; kubectl get deviceclasses lists them"


def _sizes(job: JobSpec, look: Look) -> Iterator[str]:
    """One pod that is too big for every node would wait for ever. What other pods use is not counted."""
    try:
        listed = look.items("/api/v1/nodes")
    except Refused as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        print(
            "the sizes of the nodes are not checked, as this account may not list them; to allow it: "
            "kubectl create clusterrole yaongi-nodes --verb=list --resource=nodes, and bind it to this account",
            flush=True,
        )
        return
    wanted = requests(job)
    there = nodes.usable(listed, job.cluster)
    if any(nodes.pods_on(node, wanted) for node in there):
        return
    lacking = nodes.short_of(there, wanted) or ["all of these together"]
    size = ", ".join(f"{name} {_readable(name, value)}" for name, value in wanted.items())
    what = (
        f"a worker ({size}) is too big for each of the {len(there)} nodes that it may use (of {len(listed)}): none has "
        f"enough {' or '.join(lacking)}"
        if there
        else f"none of the {len(listed)} nodes is ready, selected and tolerated"
    )
    fix = "change cluster.gpus_per_node, cpus_per_node, memory_gib_per_node, node_selector or tolerations"
    if _can_grow(look, listed):
        print(f"unless the cluster adds nodes, the job will wait: {what}; {fix}", flush=True)
    else:
        yield f"{what}; {fix}"


def requests(job: JobSpec) -> dict[str, Decimal]:
    """What one training pod asks for, in Kubernetes' base units; a fabric's sidecar counts too."""
    spec = pod_template(job_objects(job))["spec"]
    found: dict[str, Decimal] = {}
    for each in (*spec["containers"], *spec.get("initContainers", [])):  # ours restart for ever beside the worker
        for name, value in each.get("resources", {}).get("requests", {}).items():
            found[name] = found.get(name, Decimal(0)) + (Place(value).quantity or Decimal(0))
    return found


def _can_grow(look: Look, listed: list[Object]) -> bool:
    """Whether something may add nodes of other sizes on demand."""
    labels = {label for node in listed for label in node["metadata"].get("labels", {})}
    if any(label.startswith(GROUPS) for label in labels):
        return True
    return any(look.get(path) is not None for path in SCALERS)


def _readable(name: str, value: Decimal) -> str:
    return f"{value / 2**30:g} GiB" if name == "memory" else f"{value:g}"


def _allowed(look: Look, group: str, resource: str, verb: str) -> bool:
    name, _, part = resource.partition("/")
    attributes = {"namespace": look.namespace, "group": group, "resource": name, "subresource": part, "verb": verb}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    return look.post(REVIEW, body)["status"]["allowed"]
