"""Which trackers a run uses, and whether the variables with their keys are set. Imports neither torch nor a client."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator

from trainer.spec import TrainSpec
from trainer.trackerspec import KEYS, LangfuseSpec, TrackerName, TrackersSpec, variables_of

TITLES: dict[TrackerName, str] = {"wandb": "Weights & Biases", "mlflow": "MLflow", "langfuse": "Langfuse"}
LONGEST_LINE = 200
_NO_ANSWER = re.compile(r"refused|timed? ?out|resolution|not known|unreachable|max retries|reset by peer|EOF", re.I)
_DENIED = re.compile(r"\b40[13]\b|not logged in|unauthori[sz]ed|api[_ ]key", re.I)


def wanted(spec: TrainSpec) -> TrackersSpec | None:
    """The trackers of a run; None if there are none.

    Of Megatron's trainings Langfuse is told even without a section `trackers`, if its keys are there.
    """
    if spec.trackers is not None:
        return spec.trackers if spec.trackers.names else None
    if spec.engine == "megatron" and has_key("langfuse"):
        return TrackersSpec(langfuse=LangfuseSpec())
    return None


def has_key(name: TrackerName) -> bool:
    """Whether the environment has a complete set of the tracker's keys."""
    return any(all(os.environ.get(variable) for variable in complete) for complete in KEYS[name])


def named(name: TrackerName) -> str:
    """The variables of a tracker's keys in words."""
    return ", or ".join(" and ".join(complete) for complete in KEYS[name])


def without_key(name: TrackerName) -> str | None:
    """What happens without the tracker's key, and the fix; None if the key is there or may be missing."""
    if has_key(name) or name == "mlflow":  # a server of MLflow often has no access control
        return None
    fix = f"set {named(name)} in the environment, or on a cluster in the Secret"
    if name == "wandb":
        return f"{TITLES[name]}: no key; the run is recorded offline, for `wandb sync`; {fix} to send it at once"
    return f"{TITLES[name]}: no key; the run goes on without it; {fix}, or remove train.trackers.{name}"


def problems(trackers: TrackersSpec | None) -> Iterator[str]:
    """One line for each tracker that cannot be used from here as the job wants it, with the fix."""
    for name in trackers.names if trackers else ():
        if importlib.util.find_spec(name) is None:
            yield not_installed(name)
        elif line := without_key(name):
            yield line


def not_installed(name: TrackerName) -> str:
    return (
        f"{TITLES[name]}: its client is not installed; the run goes on without it; pip install 'yaongi[trackers]', or "
        f"remove train.trackers.{name}"
    )


def in_short(error: Exception) -> str:
    """One line for what a client raised, which can be whole pages."""
    text = scrubbed(f"{type(error).__name__}: {error}")
    if _DENIED.search(text):
        return "its server refuses the key"
    return "its server does not answer" if _NO_ANSWER.search(text) else text[:LONGEST_LINE]


def scrubbed(text: str) -> str:
    """One line without any key's value, which an error of a client might repeat."""
    text = " ".join(text.split())
    for name in KEYS:
        for variable in variables_of(name):
            if variable.endswith(("KEY", "TOKEN", "PASSWORD")) and (value := os.environ.get(variable)):
                text = text.replace(value, "***")
    return text
