"""What rules are about: the job, each kind of pod it makes, each container of a pod, as views of the manifest.

A TrainJob's trainer is written apart from the runtime that it changes. Where both are in the input they are joined, so
that the pod's GPUs are known; where not, rules about what only the runtime says keep silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from manifests.kinds import ANCESTOR_LABEL, PYTORCHJOB, TRAINJOB, JobKind
from manifests.lint.documents import Document
from manifests.lint.fields import TRAINER_VERSIONS
from manifests.lint.place import Path, Place

ACCELERATOR = re.compile(r"(nvidia\.com/(gpu|mig-.+)|amd\.com/gpu|habana\.ai/gaudi|gpu\.intel\.com/.+)")
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "deepspeed", "mpirun")


def accelerators(resources: Place) -> int:
    """GPUs of a container's limits (whole ones by the API's rules), 0 for none."""
    amounts = [amount for name, amount in resources["limits"].fields() if ACCELERATOR.fullmatch(name)]
    return sum(int(amount.quantity or 0) for amount in amounts)


@dataclass(frozen=True)
class AnyObject:
    """A job or runtime, whichever it is."""

    place: Place
    kind: str
    duplicates: tuple[Path, ...]


@dataclass(frozen=True)
class Container:
    """`is_main`: the container that trains. A TrainJob's `spec.trainer` is one too, with fields of its own."""

    place: Place
    is_main: bool
    resources: Place

    @property
    def name(self) -> str:
        return self.place["name"].text or "trainer"

    @property
    def words(self) -> list[str]:
        """Command and arguments; a script given to `sh -c` is split too."""
        parts = [p for key in ("command", "args") for p in self.place[key].each()]
        return [word for part in parts for word in part.text.split()]

    @property
    def launches_ranks(self) -> bool:
        return any(word.rpartition("/")[2] in LAUNCHERS or word in LAUNCHERS for word in self.words)


@dataclass(frozen=True)
class Pod:
    """A pod template and what the job says of it.

    Attributes:
        restart_policy: as the training operator reads it; None where the Job controller restarts.
        processes: of the training container; None for what torchrun finds out in the pod.
        replacing: a TrainJob's resources, which replace the runtime's.
        is_whole: False for a runtime alone, whose TrainJobs may say more.
    """

    template: Place
    kind: JobKind
    main_name: str  # "" for a pod that does not train
    replicas: int = 1
    restart_policy: str | None = None
    processes: int | None = None
    replacing: Place | None = None
    is_whole: bool = True

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
        """Of the training container."""
        if self.replacing:
            return self.replacing
        return self.main.resources if self.main else Place(None)

    @property
    def accelerators(self) -> int:
        return accelerators(self.resources)


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
        """As the operator defaults them."""
        return role["replicas"].number if role["replicas"].number is not None else 1

    @property
    def pod_count(self) -> int:
        return sum(self.replicas(role) for role in self.roles)

    @property
    def processes(self) -> int | None:
        """Processes of each pod; None for "auto" and other words that torchrun resolves in the pod."""
        written = self.spec["nprocPerNode"].value or self.elastic["nProcPerNode"].value
        return int(written) if isinstance(written, str | int) and str(written).isdigit() else None

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
        """Each replicated job and the step that its label says it is ("" for none)."""
        for entry in self.job_set["replicatedJobs"].each():
            yield entry, entry["template"]["metadata"]["labels"][ANCESTOR_LABEL].text

    @property
    def trainer(self) -> Place | None:
        return next((entry for entry, step in self.replicated_jobs() if step == "trainer"), None)

    @cached_property
    def pods(self) -> list[Pod]:
        policy = self.place["spec"]["mlPolicy"]
        nodes = [user.nodes for user in self.users if user.nodes] or [policy["numNodes"].number or 1]
        processes = [user.processes for user in self.users] or [policy["torch"]["numProcPerNode"].number]
        resources = [user.trainer.resources for user in self.users if user.trainer.resources]
        found = []
        for entry, step in self.replicated_jobs():
            template = entry["template"]["spec"]["template"]
            if step != "trainer":
                found.append(Pod(template, kind=TRAINJOB, main_name=""))
                continue
            found.append(
                Pod(
                    template,
                    kind=TRAINJOB,
                    main_name=TRAINJOB.container,
                    replicas=max(nodes),
                    processes=processes[0],
                    replacing=next(iter(resources), None),
                    is_whole=bool(self.users),
                )
            )
        return found


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
        return self.spec["trainer"]["numProcPerNode"].number

    @property
    def accelerators(self) -> int:
        return accelerators(self.trainer.resources)

    def before(self, version: str) -> bool:
        """Whether the Trainer is older than `version`."""
        return TRAINER_VERSIONS.index(self.version) < TRAINER_VERSIONS.index(version)


@dataclass(frozen=True)
class ClaimUse:
    """A claim that is in the input, used by a pod."""

    volume: Place
    claim: Place
    replicas: int


def subjects(documents: list[Document], trainer_version: str) -> Iterator[tuple[Document, Any]]:
    """Everything in the input that a rule could be about, with the document it is in."""
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
    for document, view in zip(documents, views, strict=True):
        if view is not None:
            yield document, AnyObject(view.place, view.place["kind"].text, document.duplicates)
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
    if isinstance(view, TrainJob):
        yield view.trainer
        return
    for pod in view.pods:
        yield pod
        yield from pod.containers
        for volume in pod.spec["volumes"].each():
            name = volume["persistentVolumeClaim"]["claimName"].text
            yield from (ClaimUse(volume, claim, pod.replicas) for claim in claims if name and _name(claim) == name)
