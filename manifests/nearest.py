"""The preset that a job is nearest to, and the fields in which it differs: preset.json in the run directory.

A resolved job does not name its preset, and a job file may name none, so it is found by comparison.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from manifests.spec import JobSpec, load_job, preset_names
from trainer.differences import differences

PRESET_FILE = "preset.json"
NAMES_AND_PLACES = frozenset({"name", "storage"})
WHERE_IT_RUNS = ("cluster.", "observability.", "train.runtime.", "train.parallel.", "shards.")


def nearest_preset(job: JobSpec) -> dict[str, Any]:
    """{"preset": name, "differences": [{"field", "preset", "run"}]}; the differences do not include names and folders.

    The nearest preset differs in the fewest fields that decide what is computed.
    """
    ours = _fields(job)
    compared = {name: differences([preset, ours]) for name, preset in _presets().items()}

    def computed(name: str) -> int:
        return sum(not each.field.startswith(WHERE_IT_RUNS) for each in compared[name])

    nearest = min(compared, key=computed)
    rows = [{"field": each.field, "preset": each.values[0], "run": each.values[1]} for each in compared[nearest]]
    return {"preset": nearest, "differences": rows}


def preset_file_text(job: JobSpec) -> bytes:
    """The contents of preset.json."""
    return json.dumps(nearest_preset(job), indent=1, ensure_ascii=False).encode() + b"\n"


def _fields(job: JobSpec) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude=set(NAMES_AND_PLACES))


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: _fields(load_job(name)) for name in preset_names()}
