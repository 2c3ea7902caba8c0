"""Environment variables: those set by the operators, references between them, secrets in plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests.lint.commandline import unexpanded
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Container, Pod, PyTorchJob
from manifests.variables import OPERATORS, is_secret, looks_secret

ERROR, WARNING = Severity.ERROR, Severity.WARNING
_REFERENCE = re.compile(r"(?<!\$)\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


@rule(
    "reserved-env",
    ERROR,
    PyTorchJob,
    why="The operator appends its own values after yours, and the last one wins: yours is silently replaced. A "
    "variable that it does not set in this topology takes effect with the same value in every pod: all claim "
    "the same rank.",
    fix="Remove it; the spec says the same (replicas, nprocPerNode, elasticPolicy.rdzvHost, rdzvPort, rdzvId, "
    "maxRestarts).",
)
def reserved_env(job: PyTorchJob) -> Iterator[Hit]:
    for pod in job.pods:
        for entry in pod.main.place["env"].each() if pod.main else ():
            if OPERATORS.fullmatch(entry["name"].text):
                yield Hit(entry["name"], f"{entry['name'].text} is set")


@rule(
    "duplicate-env",
    ERROR,
    Container,
    why="In a pod the last of two variables of the same name counts, whichever was meant; of a TrainJob the API "
    "server denies it.",
    fix="Keep one of them.",
)
def duplicate_env(container: Container) -> Iterator[Hit]:
    seen: set[str] = set()
    for entry in container.place["env"].each():
        name = entry["name"].text
        if name and name in seen:
            yield Hit(entry["name"], f"{name} is set twice")
        seen.add(name)


@rule(
    "env-reference",
    ERROR,
    Pod,
    why="$(NAME) in a variable's value is replaced only if NAME stands before it in the list. The operator's "
    "variables come after all of yours, so that $(MASTER_ADDR) stays there letter by letter. (In command and "
    "args it does work.)",
    fix="Move the definition up; of the operator's variables, use $(NAME) in args or read them in the process.",
)
def env_reference(pod: Pod) -> Iterator[Hit]:
    for container in pod.containers:
        entries = list(container.place["env"].each())
        later = [entry["name"].text for entry in entries]
        for entry in entries:
            later.remove(entry["name"].text)
            for name in _REFERENCE.findall(entry["value"].text):
                if name in later or (container.is_main and OPERATORS.fullmatch(name)):
                    yield Hit(entry["value"], f"$({name}) is not known yet in {entry['name'].text}")


@rule(
    "not-expanded",
    ERROR,
    Container,
    why="Without a shell nobody replaces $NAME or ${NAME}, and $(NAME) only where the container has that variable: the "
    "process gets the letters, and torchrun says 'Unsupported nproc_per_node value'.",
    fix="Write $(NAME) and define the variable, or start through sh -c.",
)
def not_expanded(container: Container) -> Iterator[Hit]:
    place = container.place
    is_partial = place["envFrom"] or place.path == ("spec", "trainer")  # a runtime may have more variables
    found = [
        (element, reference)
        for element, reference in unexpanded(place["command"], place["args"], place["env"])
        if not ("(" in reference and (is_partial or OPERATORS.fullmatch(reference.strip("$()"))))
    ]
    if container.is_main and found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        yield Hit(found[0][0], f"{found[0][1]} stays as it is{more}")


@rule(
    "secret-in-env",
    ERROR,
    Container,
    why="Whoever may read the job, its pods, its events or this file's repository reads the secret.",
    fix="Put it into a Secret and refer to it: valueFrom.secretKeyRef. Change the one that was written here.",
)
def secret_in_env(container: Container) -> Iterator[Hit]:
    for entry in container.place["env"].each():
        name, value = entry["name"].text, entry["value"].text
        if is_secret(name, value):
            yield Hit(entry["name"], f"{name} holds a secret in plain text")
    for key in ("command", "args"):
        for place in container.place[key].each():
            if looks_secret(place.text):
                yield Hit(place, "a secret in plain text")
