"""Turn the fields of the form (or command line) into one validated JobSpec: the first step of every run.

A person fills in a few plain fields; `overrides` can change anything else. Each fact has one place, so overrides may
not repeat a plain field: `arguments_for` moves such fields of a job file into the plain ones, `resolve` moves them
back.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from components.benchmarkfiles import check as check_benchmarks
from components.gates import check as check_gates
from manifests.clusterspec import ClusterSpec
from manifests.spec import JobSpec, job_from, preset
from trainer.checkpoints.checkpoint import published
from trainer.errors import SpecError
from trainer.specbase import deep_merge, parse

# Plain field → its place in the JobSpec. A value in AS_PRESET leaves the preset's own.
PLAIN = {
    "steps": "train.steps",
    "nodes": "cluster.nodes",
    "gpus_per_node": "cluster.gpus_per_node",
    "datasets_pvc": "storage.datasets_pvc",
    "checkpoints_pvc": "storage.checkpoints_pvc",
    "trainer_image": "cluster.image",
    "hub_secret": "cluster.hub_secret",
}
AS_PRESET: dict[str, str | int] = dict.fromkeys(PLAIN, "") | {"steps": 0, "nodes": 0, "gpus_per_node": -1}

_EXAMPLE = '{"train": {"seed": 1}}'


def resolve(preset: str, overrides: str = "{}", **plain: str | int | float) -> JobSpec:
    """The JobSpec from preset, plain fields and overrides (JSON).

    Args:
        preset: a preset's name, or "" when `overrides` holds a whole job.
        overrides: a JSON object of JobSpec fields.
        plain: fields of PLAIN; Kubeflow Pipelines may pass whole numbers as floats.

    Raises:
        SpecError: one line per problem.
    """
    changes = _overrides(overrides)
    repeated = [f"overrides.{path} repeats the field '{name}'" for name, path in PLAIN.items() if _holds(changes, path)]
    if repeated:
        raise SpecError("\n".join(f"{problem}; set it there only" for problem in repeated))
    for name, value in plain.items():
        if isinstance(AS_PRESET[name], int):
            value = _whole(name, value)
        if value != AS_PRESET[name]:
            changes = deep_merge(changes, _nested(PLAIN[name], value))
    return job_from({"preset": preset} if preset else {}, changes, preset)


def runnable_here(job: JobSpec) -> JobSpec:
    """Return the job if its steps can run on this machine or in this pod.

    Raises:
        SpecError: the trainer should run here but PyTorch is missing; or it should run in pods, but their volumes are
            not mounted here, so that they would not see the steps' files; or a model's folder is missing or holds
            a model of another architecture; or a gate compares with something that will not be there, or
            pods would not see the files of benchmarks.
    """
    _place_is_here(job)
    for each in (job, *([job.tuning()] if job.tune else [])):
        check_gates(each)
        check_benchmarks(each)
    if job.models and not published(job.run_dir):  # else it has begun: to evaluate or export it, none is needed
        from components.pretrained import check  # most jobs do not need its imports

        check(job, downloaded=False)
    return job


def _place_is_here(job: JobSpec) -> None:
    if job.cluster.target == "local":
        if find_spec("torch") is None:
            raise SpecError("cluster.target: local trains in this very place, which has no PyTorch; write kubernetes")
        return
    storage = job.storage
    places = {"datasets": (storage.datasets_dir, storage.datasets_pvc)}
    places["checkpoints"] = (storage.checkpoints_dir, storage.checkpoints_pvc)
    for name, (directory, claim) in places.items():
        if not Path(directory).is_dir():
            raise SpecError(
                f"storage.{name}_dir: {directory} is not a folder here; the trainer's pods find the volume of claim "
                f"'{claim}' there, so it must be mounted there where the other steps run too"
            )


def placement(preset_name: str, overrides: str) -> ClusterSpec | None:
    """Where the training jobs are, for a step without the result of `plan`; None for a form that `plan` refuses.

    The plain fields do not affect this.
    """
    try:
        found = deep_merge(preset(preset_name) if preset_name else {}, _overrides(overrides)).get("cluster", {})
        # Whether a fabric has its GPUs depends on a plain field.
        return parse(ClusterSpec, {name: value for name, value in found.items() if name != "fabric"}, "cluster")
    except (ValueError, TypeError):
        return None


def arguments_for(preset: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments from which `resolve` makes preset + `changes`; unchanged plain fields are left out."""
    plain: dict[str, Any] = {}
    rest = json.loads(json.dumps(changes))
    for name, path in PLAIN.items():
        if _holds(rest, path):
            section, field = path.split(".")
            plain[name] = rest[section].pop(field)
            if not rest[section]:
                del rest[section]
    return {"preset": preset, **plain, "overrides": json.dumps(rest, ensure_ascii=False)}


def _overrides(text: str) -> dict[str, Any]:
    try:
        changes = json.loads(text or "{}")
    except ValueError as error:
        raise SpecError(f"overrides: not valid JSON ({error}); write an object such as {_EXAMPLE}") from None
    if not isinstance(changes, dict):
        raise SpecError(f"overrides: expected a JSON object such as {_EXAMPLE}, got {type(changes).__name__}")
    return changes


def _holds(changes: dict[str, Any], path: str) -> bool:
    section, field = path.split(".")
    return isinstance(changes.get(section), dict) and field in changes[section]


def _nested(path: str, value: Any) -> dict[str, Any]:
    section, field = path.split(".")
    return {section: {field: value}}


def _whole(name: str, value: str | int | float) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise SpecError(f"{name}: expected a whole number, got {value!r}")
    return int(value)
