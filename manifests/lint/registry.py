"""The class of a rule and the table of all rules; each module of rules registers its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from manifests.lint.place import Place


class Severity(StrEnum):
    """An error is rejected, never runs, wastes GPUs or gives a wrong result; a warning does so only on a bad day."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Hit:
    """The place of a violation, and what it is."""

    place: Place
    what: str


Check = Callable[[Any], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """`why`: the real effect, measured or read in the operator's source; `fix`: what to write instead."""

    id: str
    severity: Severity
    subject: type
    why: str
    fix: str
    check: Check


IGNORE_ANNOTATION = "yaongi/lint-ignore"
RULES: dict[str, Rule] = {}
# Former names of rules, which annotations may still use.
FORMER = {
    "unknown-pod-field": "unknown-field",
    "trainjob-unknown-field": "unknown-field",
    "env-not-a-string": "not-a-string",
    "pod-label-not-a-string": "not-a-string",
    "pod-not-a-number": "not-a-number",
}


def rule(id: str, severity: Severity, subject: type, *, why: str, fix: str) -> Callable[[Check], Check]:
    """Register a generator of hits; it is called once per `subject` (see `subjects`) in the input."""

    def register(check: Check) -> Check:
        assert id not in RULES, f"two rules are called {id}"
        RULES[id] = Rule(id, severity, subject, why, fix, check)
        return check

    return register


def ignored(annotations: Place) -> list[str]:
    """Names of the rules that an object's annotations switch off, as written there."""
    words = [word.strip() for word in annotations[IGNORE_ANNOTATION].text.split(",") if word.strip()]
    return [FORMER.get(word, word) for word in words]
