"""Kueue, and whether the queue that a job names exists, is open and is large enough for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial

from components.cluster.look import Look
from components.plan.admissible import refusals
from manifests.clusterspec import ClusterSpec
from manifests.kinds import Object
from manifests.lint.place import Place
from manifests.queue import GROUP, VERSIONS, version_of
from manifests.rbac import QUEUE_RULES
from pipelines.doctor.findings import Finding, State, told
from pipelines.doctor.permissions import granting

GIB = 2**30
TRIED = (0, 17)  # the version of Kueue that queued jobs were run with
KUEUE_IMAGES, TRAINER_IMAGES = ("kueue",), ("trainer", "trainer-controller-manager")
PATCHES_SINCE = (0, 17), (2, 2)  # Kueue writes runtimePatches into TrainJobs, Trainer reads them
NAME_ANOTHER = "kubectl get localqueues; set cluster.queue to one, or have it created"


def queues(look: Look, wanted: ClusterSpec, pod: dict[str, Decimal]) -> Iterator[Finding]:
    """Optional, unless the job names a queue.

    Args:
        pod: what each of the job's pods asks for, in Kubernetes' base units.
    """
    group, queue = look.get(f"/apis/{GROUP}"), wanted.queue
    if group is None:
        detail = "cluster.queue names a queue, but the cluster has no Kueue" if queue else "none"
        state: State = "no" if queue else "missing"
        yield Finding("Kueue", state, detail, "install Kueue to share GPUs fairly, or leave cluster.queue out")
        return
    served = [each["version"] for each in group["versions"]]
    version = version_of(served)
    if version is None:
        detail = f"serves {GROUP} only as {', '.join(served)}; this yaongi knows {' and '.join(VERSIONS)}"
        yield Finding("Kueue", "missing", detail, "jobs can wait in its queues, but why is not said: update yaongi")
        return
    if queue is None:
        yield Finding("Kueue", "ok", f"installed ({version}); cluster.queue names no queue")
        return
    api = f"/apis/{GROUP}/{version}"
    local = look.get(f"{api}/namespaces/{look.namespace}/localqueues/{queue}")
    if local is None:
        yield Finding("Kueue", "no", f"namespace '{look.namespace}' has no LocalQueue '{queue}'", NAME_ANOTHER)
        return
    if closed := _closed(local):
        yield Finding(
            "Kueue", "no", f"queue '{queue}' takes no jobs: {closed}", "have its administrator start it again"
        )
    else:
        yield Finding("Kueue", "ok", f"queue '{queue}' is there and open")
    needs = {resource: amount * wanted.nodes for resource, amount in pod.items()}
    yield from told("Kueue's version", partial(_version, look, wanted))
    yield from told("queue's quota", partial(_quota, look, needs, api, local["spec"]["clusterQueue"]))
    if wanted.queue_priority:
        yield from told("queue's priority", partial(_priority, look, api, wanted.queue_priority))
    if refused := refusals(look, QUEUE_RULES):
        detail = f"this account may not {', '.join(refused)}: why a job waits is not said"
        yield Finding("queue's rights", "missing", detail, granting(look))


def _version(look: Look, wanted: ClusterSpec) -> Iterator[Finding]:
    kueue, number = _running(look, KUEUE_IMAGES)
    if not kueue:
        yield Finding("Kueue's version", "unknown", "no deployment of it in any namespace", "check that Kueue runs")
        return
    trainer, trainers = _running(look, TRAINER_IMAGES)
    if wanted.job == "trainjob" and number >= PATCHES_SINCE[0] and () < trainers < PATCHES_SINCE[1]:
        remedy = "use Kubeflow Trainer 2.2 or newer, or cluster.job=pytorchjob"
        yield Finding("Kueue's version", "no", f"TrainJobs in a queue never start: {kueue} with {trainer}", remedy)
        return
    known = number == TRIED
    remedy = "" if known else f"queued jobs were tried with Kueue {TRIED[0]}.{TRIED[1]}; another version may differ"
    yield Finding("Kueue's version", "ok" if known else "missing", f"runs {kueue}", remedy)


def _running(look: Look, names: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """The image of the deployment that runs one of these images, and its version; empty if unknown."""
    for deployment in look.items("/apis/apps/v1/deployments"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            image = container["image"]
            if image.rpartition("/")[2].partition("@")[0].partition(":")[0] in names:
                number = re.search(r":v?(\d+)\.(\d+)", image)
                return image, (int(number[1]), int(number[2])) if number else ()
    return "", ()


def _quota(look: Look, needs: dict[str, Decimal], api: str, name: str) -> Iterator[Finding]:
    queue = look.get(f"{api}/clusterqueues/{name}")
    if queue is None:
        yield Finding("queue's quota", "no", f"there is no ClusterQueue '{name}'", "have it created")
        return
    if closed := _closed(queue):
        remedy = f"kubectl describe clusterqueue {name}; have its administrator start it again"
        yield Finding("queue's quota", "no", f"ClusterQueue '{name}' admits nothing: {closed}", remedy)
        return
    lacks = _lacks(queue, needs)
    if not lacks:
        yield Finding("queue's quota", "ok", f"ClusterQueue '{name}' can hold the job (what others use is not counted)")
        return
    remedy = "ask for less (cluster.nodes, cpus_per_node, memory_gib_per_node, gpus_per_node), or name another queue"
    yield Finding("queue's quota", "no", f"ClusterQueue '{name}' can never hold the job: {'; '.join(lacks)}", remedy)


def _lacks(queue: Object, needs: dict[str, Decimal]) -> list[str]:
    """What no flavor of the queue has enough of. All pods get the same flavor, for all resources of its group."""
    groups, lacks = queue["spec"].get("resourceGroups", []), []
    covered: set[str] = set()
    cohort = bool(queue["spec"].get("cohortName") or queue["spec"].get("cohort"))
    for group in groups:
        here = {resource: needs[resource] for resource in group["coveredResources"] if resource in needs}
        covered |= here.keys()
        best: list[str] | None = None
        for flavor in group["flavors"]:
            most = {each["name"]: _most(each, cohort) for each in flavor["resources"]}
            short = [
                f"{_text(resource, amount)} of {resource} needed, at most {_text(resource, limit)} in flavor "
                f"{flavor['name']}"
                for resource, amount in here.items()
                if (limit := most[resource]) is not None and amount > limit
            ]
            best = short if best is None or len(short) < len(best) else best
        lacks += best or []
    return lacks + [f"no quota for {resource}" for resource in needs if resource not in covered]


def _most(resource: Object, in_cohort: bool) -> Decimal | None:
    """The most that the queue can have of a resource; None where only its cohort knows."""
    own = Place(resource["nominalQuota"]).quantity or Decimal(0)
    if not in_cohort:
        return own
    limit = resource.get("borrowingLimit")
    return None if limit is None else own + (Place(limit).quantity or Decimal(0))


def _text(resource: str, amount: Decimal) -> str:
    return f"{float(amount / GIB):g} GiB" if resource == "memory" else f"{float(amount):g}"


def _priority(look: Look, api: str, name: str) -> Iterator[Finding]:
    found = look.get(f"{api}/workloadpriorityclasses/{name}")
    if found is None:
        remedy = "kubectl get workloadpriorityclasses; set cluster.queue_priority to one, or have it created"
        yield Finding("queue's priority", "no", f"there is no WorkloadPriorityClass '{name}'", remedy)
    else:
        yield Finding("queue's priority", "ok", f"class '{name}' has priority {found['value']}")


def _closed(queue: Object) -> str:
    """Why a LocalQueue or ClusterQueue is not active; "" if it is, or does not say yet."""
    conditions = queue.get("status", {}).get("conditions", [])
    return next((c.get("message", "") for c in conditions if c["type"] == "Active" and c["status"] != "True"), "")
