"""Read the data of a report from a run directory; it also works for an unfinished run.

The parts of missing files are left out; a damaged file is an error, because a partial report would mislead. Imports no
torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import CheckpointManifest, latest_step, read_manifest, step_dir
from trainer.data.manifest import SourceEntry
from trainer.data.manifest import read_manifest as read_data_manifest
from trainer.errors import CheckpointError, DataError
from trainer.recording.results import read_json
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it.

    Attributes:
        steps: the lines of logs/metrics.jsonl, one for each step.
        result, evaluation, export: result.json, eval.json and export/manifest.json, None when absent.
        checkpoint: of the newest checkpoint; not verified, that takes minutes for a large one.
        sources: provenance of each source of the mix; empty when the shards are not reachable from here.
    """

    directory: Path
    spec: TrainSpec
    steps: list[dict[str, Any]] = field(repr=False)
    result: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    export: dict[str, Any] | None
    checkpoint: CheckpointManifest | None
    sources: dict[str, SourceEntry]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        SpecError: train.yaml is missing or unusable.
        CheckpointError: a file of the run is damaged.
    """
    directory = Path(run_dir)
    spec = parse(TrainSpec, read_yaml(directory / "train.yaml"), str(directory / "train.yaml"))
    newest = step_dir(directory, latest_step(directory))
    return Run(
        directory=directory,
        spec=spec,
        steps=_read_steps(directory / "logs" / "metrics.jsonl"),
        result=read_json(directory / "result.json"),
        evaluation=read_json(directory / "eval.json"),
        export=read_json(directory / "export" / "manifest.json"),
        checkpoint=read_manifest(newest) if newest.is_dir() else None,
        sources=read_sources(spec),
    )


def read_sources(spec: TrainSpec) -> dict[str, SourceEntry]:
    """Provenance of the sources of the mix from the shards' manifest; empty when that is not here."""
    try:
        manifest = read_data_manifest(spec.tokens.shards, "shards")
    except DataError:
        return {}
    return {name: manifest.sources[name] for name in spec.tokens.mix if name in manifest.sources}


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; the last may be cut off, because the run may be writing it now."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    del rest
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise CheckpointError(f"{path}: a line is not JSON ({error}); restore or remove it") from None
