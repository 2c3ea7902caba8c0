"""Read the data of a report from a run directory; it also works for an unfinished run.

The parts of missing files are left out; a damaged file is an error, because a partial report would mislead. Imports no
torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import CheckpointManifest, latest_step, read_manifest, step_dir
from trainer.data.manifest import Manifest, SourceEntry
from trainer.data.manifest import read_manifest as read_data_manifest
from trainer.errors import CheckpointError, DataError
from trainer.parameters import parameters
from trainer.process import restarts
from trainer.recording import goodput
from trainer.recording.goodput import Process
from trainer.recording.results import read_json
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml

ROWS = "rows.json"  # by rank 0 (trainer/rows.py)
PROOF = "proof.json"  # by rank 0 (trainer/proof/told.py)
PRESET = "preset.json"  # by the launcher (manifests/nearest.py)


@dataclass(frozen=True)
class Run:
    """A run as its directory shows it.

    Attributes:
        steps: the lines of logs/metrics.jsonl, one for each step.
        validations: the lines of validation.jsonl, one for each validation during training, in the order of steps.
        result, evaluation, export, preset: result.json, eval.json, export/manifest.json and preset.json, None when
            absent.
        checkpoint: of the newest checkpoint; not verified, that takes minutes for a large one.
        shards: manifest of the shards; None when it is not reachable from here.
        proof: proof.json, of kernels at the newest start; None when nothing was proven, as on a CPU.
        causes: number of restarts by cause.
        begun: Unix time of the first start.
        rows: of a micro-batch, as the last start has found them; None where the spec says how many.
    """

    directory: Path
    spec: TrainSpec
    steps: list[dict[str, Any]] = field(repr=False)
    validations: list[dict[str, Any]] = field(repr=False)
    result: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    export: dict[str, Any] | None
    preset: dict[str, Any] | None
    proof: dict[str, Any] | None
    checkpoint: CheckpointManifest | None
    shards: Manifest | None
    processes: list[Process]
    causes: dict[str, int]
    begun: float | None
    rows: int | None = None

    @property
    def sources(self) -> dict[str, SourceEntry]:
        """Provenance of each source of the mix; empty when the shards are not reachable from here."""
        known = self.shards.sources if self.shards else {}
        return {name: known[name] for name in self.spec.tokens.mix if name in known}

    @property
    def parameters(self) -> int:
        """Number of trained and frozen parameters, without adapters, as in an export."""
        model = self.spec.model.model_copy(update={"lora": None})
        return sum(math.prod(parameter.shape) for parameter in parameters(model))

    @property
    def tokens(self) -> int:
        return int(self.steps[-1]["tokens"]) if self.steps else 0

    @cached_property
    def goodput(self) -> dict[str, float]:
        """Seconds of wall time by class."""
        return goodput.account(self.processes, self.steps, self.begun, (self.result or {}).get("seconds", 0.0))


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
        SpecError: train.yaml is missing or unusable.
        CheckpointError: a file of the run is damaged.
    """
    directory = Path(run_dir)
    spec = parse(TrainSpec, read_yaml(directory / "train.yaml"), str(directory / "train.yaml"))
    newest = step_dir(directory, latest_step(directory))
    steps = _read_lines(directory / "logs" / "metrics.jsonl", "step")
    return Run(
        directory=directory,
        spec=spec,
        steps=steps,
        validations=_read_validations(directory, steps),
        result=read_json(directory / "result.json"),
        evaluation=read_json(directory / "eval.json", ("domains",)),
        export=read_json(directory / "export" / "manifest.json"),
        preset=read_json(directory / PRESET),
        proof=read_json(directory / PROOF, ("kernels", "trial", "remarks")),
        checkpoint=read_manifest(newest) if newest.is_dir() else None,
        shards=_read_shards(spec),
        processes=goodput.read(directory),
        causes=restarts.summary(directory),
        begun=restarts.begun(directory),
        rows=(read_json(directory / ROWS, ("rows",)) or {}).get("rows"),
    )


def _read_shards(spec: TrainSpec) -> Manifest | None:
    try:
        return read_data_manifest(spec.tokens.shards, "shards")
    except DataError:
        return None


def _read_validations(directory: Path, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each step: a step that was trained again was also validated again, and only the last one counts."""
    by_step = {line["step"]: line for line in _read_lines(directory / "validation.jsonl", "step", "domains")}
    last = steps[-1]["step"] if steps else 0
    return [by_step[step] for step in sorted(by_step) if step <= last]


def _read_lines(path: Path, *names: str) -> list[dict[str, Any]]:
    """Lines of JSON objects that have these names; the last may be cut off, because the run may be writing it now."""
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    del rest
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise CheckpointError(f"{path}: a line is not JSON ({error}); restore or remove it") from None
    for number, line in enumerate(found, start=1):
        if not (isinstance(line, dict) and line.keys() >= set(names)):
            raise CheckpointError(f"{path}: line {number} lacks {' and '.join(names)}; restore or remove it")
    return found
