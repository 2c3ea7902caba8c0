"""Run every rule over manifests: texts in, findings out."""

from __future__ import annotations

from dataclasses import dataclass

# Importing these modules registers their rules.
from manifests.lint import (
    environment,
    launching,
    lifecycle,
    pods,
    resources,
    scheduling,
    security,
    shape,
    topology,
    trainjob,
)
from manifests.lint.documents import Document, read
from manifests.lint.place import Path, Place, path_text
from manifests.lint.registry import RULES, Severity, ignored
from manifests.lint.structure import Problem
from manifests.lint.subjects import AnyObject, PyTorchJob, Runtime, TrainJob, subjects

RULE_MODULES = (topology, launching, lifecycle, trainjob, resources, scheduling, pods, environment, security, shape)
NEWEST_MEASURED_TRAINER = "2.3"


@dataclass(frozen=True)
class Finding:
    """One violation of a rule. `line` counts from 1."""

    rule: str
    severity: Severity
    source: str
    line: int
    object: str
    path: str
    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class Result:
    """`jobs`: number of jobs and runtimes among `objects`."""

    findings: list[Finding]
    objects: int
    jobs: int

    @property
    def errors(self) -> int:
        return sum(finding.severity is Severity.ERROR for finding in self.findings)


def lint(texts: dict[str, str], trainer_version: str = NEWEST_MEASURED_TRAINER) -> Result:
    """Check every PyTorchJob, TrainJob and training runtime; all texts are one input and may refer to each other.

    Args:
        texts: manifests by the name used in findings.
        trainer_version: the Kubeflow Trainer version to check TrainJobs for, one of `TRAINER_VERSIONS`.
    Raises:
        Unreadable: a text is not YAML of Kubernetes objects.
    """
    documents = [document for source, text in texts.items() for document in read(text, source)]
    found: list[Finding] = []
    jobs = 0
    problems: list[Problem] = []
    for document, subject in subjects(documents, trainer_version):
        jobs += isinstance(subject, PyTorchJob | TrainJob | Runtime)
        if isinstance(subject, AnyObject):  # the document's first object
            problems = subject.problems
        switched_off = ignored(Place(document.value)["metadata"]["annotations"])
        for rule in RULES.values():
            if isinstance(subject, rule.subject) and rule.id not in switched_off:
                for hit in rule.check(subject):
                    if rule.subject is not AnyObject and any(problem.explains(hit.place.path) for problem in problems):
                        continue
                    finding = _finding(rule.id, document, hit.place.path, hit.what)
                    if finding not in found:  # a runtime's pods, once for each of its TrainJobs
                        found.append(finding)
    order = list(texts)
    found.sort(key=lambda f: (order.index(f.source), f.line, f.severity, f.rule, f.path))
    return Result(found, len(documents), jobs)


def _finding(rule_id: str, document: Document, path: Path, what: str) -> Finding:
    rule = RULES[rule_id]
    name = Place(document.value)["metadata"]["name"].text
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        source=document.source,
        line=document.line(path),
        object=f"{document.value['kind']}/{name or '(unnamed)'}",
        path=path_text(path),
        what=what,
        why=rule.why,
        fix=rule.fix,
    )
