"""The subjects of rules: the job, each kind of pod it makes, each container of a pod, as views of the manifest.

A TrainJob is separate from the runtime that it changes. If both are in the input they are joined, so that the pod's
GPUs are known; if not, rules about settings of the runtime report nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from manifests.kinds import ANCESTOR_LABEL, PYTORCHJOB, TRAINJOB, JobKind
from manifests.lint.commandline import Launch, launches
from manifests.lint.documents import Document
from manifests.lint.fields import TRAINER_VERSIONS, of_kind
from manifests.lint.overrides import overridden
from manifests.lint.place import Path, Place
from manifests.lint.structure import Problem, problems

ACCELERATOR = re.compile(r"(nvidia\.com/(gpu|mig-.+)|amd\.com/gpu|habana\.ai/gaudi|gpu\.intel\.com/.+)")


# Names of runtimes whose trainers are not torch processes.
NOT_TORCH = ("jax", "xgboost", "mlx", "flux", "mpi", "deepspeed")


def whole(place: Place) -> int | None:
    """An integer, even if written as a string; None for "auto" and the like."""
    text = str(place.value)
    return int(text) if isinstance(place.value, str | int) and text.isascii() and text.isdigit() else None


def accelerators(resources: Place) -> int:
    """GPUs in a container's limits (integers by the API's rules), 0 for none."""
    amounts = [amount for name, amount in resources["limits"].fields() if ACCELERATOR.fullmatch(name)]
    return sum(int(amount.quantity or 0) for amount in amounts)


@dataclass(frozen=True)
class AnyObject:
    """Any object of a kind with a known schema, or of a similar kind."""

    place: Place
    kind: str
    duplicates: tuple[Path, ...]
    version: str  # of Kubeflow Trainer

    @cached_property
    def problems(self) -> list[Problem]:
        """Problems of its structure."""
        object = of_kind(self.place["apiVersion"].value, self.kind, self.version)
        return problems(self.place, object, self.version) if object else []


@dataclass(frozen=True)
class Container:
    """`is_main`: the training container. A TrainJob's `spec.trainer` counts as one too, with different fields."""

    place: Place
    is_main: bool
    resources: Place

    @property
    def name(self) -> str:
        return self.place["name"].text or "trainer"


@dataclass(frozen=True)
class Pod:
    """A pod template and the job's settings for it.

    Attributes:
        restart_policy: as the training operator reads it; None if the Job controller restarts.
        processes: number in the training container; None if torchrun determines it in the pod.
        trainer: a TrainJob's spec.trainer, whose command, arguments and resources replace the runtime's.
        is_whole: False for a runtime alone, whose TrainJobs may add settings.
        claimed: volumes that JobSet makes from its own claims.
    """

    template: Place
    kind: JobKind
    main_name: str  # "" for a pod that does not train
    replicas: int = 1
    restart_policy: str | None = None
    processes: int | None = None
    trainer: Container | None = None
    is_whole: bool = True
    claimed: tuple[str, ...] = ()

    @property
    def spec(self) -> Place:
        return self.template["spec"]

    @cached_property
    def containers(self) -> list[Container]:
        found = [(place, False) for place in self.spec["initContainers"].each()]
        found += [(place, place["name"].text == self.main_name) for place in self.spec["containers"].each()]
        return [Container(place, is_main, place["resources"]) for place, is_main in found]

    @property
    def main(self) -> Container | None:
        return next((container for container in self.containers if container.is_main), None)

    @property
    def resources(self) -> Place:
        """The resources of the training container."""
        if self.trainer and self.trainer.resources:
            return self.trainer.resources
        return self.main.resources if self.main else Place(None)

    @property
    def accelerators(self) -> int:
        return accelerators(self.resources)

    @cached_property
    def launches(self) -> list[Launch]:
        """How the training container starts; empty if its image or an unknown program decides."""
        if self.main is None:
            return []
        said = [part.place for part in (self.trainer, self.main) if part]
        command, args = (next((place[key] for place in said if place[key]), Place(None)) for key in ("command", "args"))
        env = [entry.value for place in reversed(said) for entry in place["env"].each()]
        return launches(command, args, Place(env))


@dataclass(frozen=True)
class Start:
    """How the processes of one kind of pod are started, and the job's settings for them; None means unknown.

    Attributes:
        launches: see `launches`.
        pods: number of pods of the whole job; the maximum for an elastic job.
        fewest: minimum number of pods of an elastic job.
        present: current number of pods of an elastic job.
        alike: number of pods that this command line starts.
        role: Master or Worker of a PyTorchJob.
        first: name of the pod with the rendezvous.
        meets: whether an elastic policy gives torchrun the rendezvous endpoint.
    """

    launches: list[Launch]
    processes: int | None
    accelerators: int
    pods: int | None
    fewest: int | None
    alike: int | None
    role: str = ""
    first: str = ""
    meets: bool = False
    present: int | None = None
    max_restarts: int | None = None


@dataclass(frozen=True)
class PyTorchJob:
    place: Place

    @property
    def spec(self) -> Place:
        return self.place["spec"]

    @property
    def run_policy(self) -> Place:
        return self.spec["runPolicy"]

    @property
    def elastic(self) -> Place:
        return self.spec["elasticPolicy"]

    @property
    def master(self) -> Place:
        return self.spec["pytorchReplicaSpecs"]["Master"]

    @property
    def worker(self) -> Place:
        return self.spec["pytorchReplicaSpecs"]["Worker"]

    @property
    def roles(self) -> list[Place]:
        return [place for place in (self.master, self.worker) if place]

    def replicas(self, role: Place) -> int:
        """The replicas after the operator's defaults."""
        return role["replicas"].number if role["replicas"].number is not None else 1

    @property
    def pod_count(self) -> int:
        return sum(self.replicas(role) for role in self.roles)

    @property
    def processes(self) -> int | None:
        """Processes of each pod; None for "auto" and other words that torchrun resolves in the pod."""
        written = self.spec["nprocPerNode"].value or self.elastic["nProcPerNode"].value
        return whole(Place(written))

    @property
    def starts(self) -> Iterator[Start]:
        name = self.place["metadata"]["name"].text
        low, high = self.elastic["minReplicas"].number, self.elastic["maxReplicas"].number
        for role, pod in zip(self.roles, self.pods, strict=True):
            if pod.main:
                yield Start(
                    pod.launches,
                    self.processes,
                    pod.accelerators,
                    max(self.pod_count, high or 0),
                    self.pod_count if low is None else low,
                    max(pod.replicas, high or 0) if role is self.worker or self.elastic else pod.replicas,
                    role=str(role.path[-1]),
                    first=f"{name}-{'master' if self.master else 'worker'}-0" if name else "",
                    meets=bool(self.elastic),
                    present=self.pod_count,
                    max_restarts=self.elastic["maxRestarts"].number,
                )

    @cached_property
    def pods(self) -> list[Pod]:
        return [
            Pod(
                role["template"],
                kind=PYTORCHJOB,
                main_name=PYTORCHJOB.container,
                replicas=self.replicas(role),
                restart_policy=role["restartPolicy"].text or "OnFailure",
                processes=self.processes,
            )
            for role in self.roles
        ]


@dataclass(frozen=True)
class Runtime:
    """A TrainingRuntime or ClusterTrainingRuntime, with the TrainJobs of the input that use it."""

    place: Place
    users: list[TrainJob] = field(default_factory=list)

    @property
    def job_set(self) -> Place:
        return self.place["spec"]["template"]["spec"]

    def replicated_jobs(self) -> Iterator[tuple[Place, str]]:
        """Each replicated job and the step in its label ("" for none)."""
        for entry in self.job_set["replicatedJobs"].each():
            yield entry, entry["template"]["metadata"]["labels"][ANCESTOR_LABEL].text

    @property
    def trainer(self) -> Place | None:
        return next((entry for entry, step in self.replicated_jobs() if step == "trainer"), None)

    @property
    def starts(self) -> Iterator[Start]:
        """The starts that the TrainJobs do not override."""
        for pod in self.pods:
            if pod.main and not (pod.trainer and (pod.trainer.place["command"] or pod.trainer.place["args"])):
                yield Start(pod.launches, pod.processes, pod.accelerators, pod.replicas, pod.replicas, pod.replicas)

    @property
    def starts_itself(self) -> bool:
        """Whether one process per pod is right: the framework is not torch, or another policy starts the rest."""
        policy = self.place["spec"]["mlPolicy"]
        return any(policy[name] for name in ("jax", "xgboost", "flux", "mpi"))

    def pods_of(self, user: TrainJob | None) -> list[Pod]:
        """The pods with a TrainJob's changes, or of the runtime alone."""
        policy = self.place["spec"]["mlPolicy"]
        nodes = (user.nodes if user else None) or policy["numNodes"].number or 1
        processes = whole(policy["torch"]["numProcPerNode"])
        if user and user.processes is not None:
            processes = user.processes
        found = []
        for entry, step in self.replicated_jobs():
            template = entry["template"]["spec"]["template"]
            if user:
                template = overridden(template, entry["name"].text, user.place, user.version)
            if step != "trainer":
                found.append(Pod(template, kind=TRAINJOB, main_name="", claimed=self.claimed))
                continue
            found.append(
                Pod(
                    template,
                    kind=TRAINJOB,
                    main_name=TRAINJOB.container,
                    replicas=nodes,
                    processes=None if self.starts_itself else processes,
                    trainer=user.trainer if user else None,
                    is_whole=user is not None,
                    claimed=self.claimed,
                )
            )
        return found

    @cached_property
    def pods(self) -> list[Pod]:
        """The pods of each TrainJob in the input."""
        users: Sequence[TrainJob | None] = self.users or [None]
        return [pod for user in users for pod in self.pods_of(user)]

    @property
    def claimed(self) -> tuple[str, ...]:
        """Names of volumes that JobSet makes from its own claims (from Trainer 2.2)."""
        policies = self.job_set["volumeClaimPolicies"]
        return tuple(c["metadata"]["name"].text for policy in policies.each() for c in policy["templates"].each())


@dataclass
class TrainJob:
    """`version`: of Kubeflow Trainer, whose fields change. `runtime`: if it is in the input; `other_scope`: names of
    the input's runtimes of the kind that runtimeRef does not mean.
    """

    place: Place
    version: str
    runtime: Runtime | None = None
    other_scope: frozenset[str] = frozenset()

    @property
    def spec(self) -> Place:
        return self.place["spec"]

    @property
    def trainer(self) -> Container:
        return Container(self.spec["trainer"], True, self.spec["trainer"]["resourcesPerNode"])

    @property
    def nodes(self) -> int | None:
        return self.spec["trainer"]["numNodes"].number

    @property
    def processes(self) -> int | None:
        return whole(self.spec["trainer"]["numProcPerNode"])

    @property
    def accelerators(self) -> int:
        return self.pod.accelerators if self.pod else accelerators(self.trainer.resources)

    @property
    def pod(self) -> Pod | None:
        """The trainer's pod, if the runtime is in the input."""
        pods = self.runtime.pods_of(self) if self.runtime else []
        return next((pod for pod in pods if pod.main), None)

    @property
    def starts(self) -> Iterator[Start]:
        """The starts defined by the job itself."""
        trainer, pod = self.trainer, self.pod
        if not (trainer.place["command"] or trainer.place["args"]):
            return
        found = pod.launches if pod else launches(*(trainer.place[key] for key in ("command", "args", "env")))
        nodes = pod.replicas if pod else self.nodes
        name = self.spec["runtimeRef"]["name"].text
        other = self.runtime.starts_itself if self.runtime else any(word in name for word in NOT_TORCH)
        if other:
            found = [launch for launch in found if launch.launcher != "python"]
        processes = pod.processes if pod else self.processes
        yield Start(found, processes, self.accelerators, nodes, nodes, nodes)

    def overrides(self) -> Iterator[tuple[Place, Place]]:
        """Each replicated job that its overrides and patches name, and the spec of pods that they give it."""
        for override in self.spec["podSpecOverrides"].each():
            yield from ((target, override) for target in override["targetJobs"].each())
        for override in self.spec["podTemplateOverrides"].each():
            yield from ((target, override["spec"]) for target in override["targetJobs"].each())
        for patch in self.spec["runtimePatches"].each():
            for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"].each():
                yield job, job["template"]["spec"]["template"]["spec"]

    def before(self, version: str) -> bool:
        """Whether the Trainer is older than `version`."""
        return TRAINER_VERSIONS.index(self.version) < TRAINER_VERSIONS.index(version)


@dataclass(frozen=True)
class ClaimUse:
    """A claim in the input that a pod uses."""

    volume: Place
    claim: Place
    replicas: int


def subjects(documents: list[Document], trainer_version: str) -> Iterator[tuple[Document, Any]]:
    """Every subject in the input, with its document."""
    places = [Place(document.value) for document in documents]
    claims = [place for place in places if place["kind"].text == "PersistentVolumeClaim"]
    views = [_view(place, trainer_version) for place in places]
    runtimes = {(v.place["kind"].text, _name(v.place)): v for v in views if isinstance(v, Runtime)}
    for view in views:
        if isinstance(view, TrainJob):
            reference = view.spec["runtimeRef"]
            kind = reference["kind"].text or "ClusterTrainingRuntime"
            view.runtime = runtimes.get((kind, reference["name"].text))
            view.other_scope = frozenset(
                name for other, name in runtimes if other != kind and (kind, name) not in runtimes
            )
            if view.runtime:
                view.runtime.users.append(view)
    for document, place, view in zip(documents, places, views, strict=True):
        yield document, AnyObject(place, place["kind"].text, document.duplicates, trainer_version)
        if view is not None:
            yield document, view
            yield from ((document, part) for part in _parts(view, claims))


def _view(place: Place, trainer_version: str) -> PyTorchJob | TrainJob | Runtime | None:
    match place["kind"].text:
        case "PyTorchJob":
            return PyTorchJob(place)
        case "TrainJob":
            return TrainJob(place, trainer_version)
        case "TrainingRuntime" | "ClusterTrainingRuntime":
            return Runtime(place)
    return None


def _name(place: Place) -> str:
    return place["metadata"]["name"].text


def _parts(view: PyTorchJob | TrainJob | Runtime, claims: list[Place]) -> Iterator[Any]:
    yield from view.starts
    if isinstance(view, TrainJob):
        yield view.trainer
        return
    for pod in view.pods:
        yield pod
        yield from pod.containers
        for volume in pod.spec["volumes"].each():
            name = volume["persistentVolumeClaim"]["claimName"].text
            yield from (ClaimUse(volume, claim, pod.replicas) for claim in claims if name and _name(claim) == name)
