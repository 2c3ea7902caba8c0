"""The checkpoints from which a run of changed length may continue: those from before the rate depended on the length.

Warm-up and the stable part of WSD are the same for every length (trainer/optim/schedule.py), so a run lengthened there
is identical to one that had the new length from the start. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from trainer.checkpoints.checkpoint import CheckpointManifest, read_manifest, step_of
from trainer.errors import CheckpointError, SpecError
from trainer.spec import ScheduleSpec, TrainSpec


def continuable(found: list[Path], spec: TrainSpec) -> list[Path]:
    """The checkpoints in `found`, newest first, from which a run of the spec's length may continue; all if the length
    is equal.

    Unreadable ones are included: loading them reports the error.

    Raises:
        SpecError: all checkpoints were saved after the rate had begun to fall, or beyond the end; or the run would
            become shorter and lose trained steps. Only a longer run discards the former end.
    """
    kept = [path for path in found if _fits(path, spec)]
    if kept[:1] == found[:1]:
        return kept
    newest = read_manifest(found[0])
    length = int(newest.spec["steps"])
    if kept and length > spec.steps:
        raise SpecError(
            f"{spec.run_dir}: is {length} steps long now and stands at step {newest.step}; as a run of {spec.steps} it "
            f"would lose what it has trained from step {step_of(kept[0])} on; write train.steps={length} "
            "(--set), or give the job another name"
        )
    if not kept:
        if newest.step > spec.steps:
            raise SpecError(
                f"{spec.run_dir}: stands at step {newest.step}, beyond train.steps {spec.steps}; give it at least "
                f"{newest.step}, or this run another name",
            )
        begins = min(spec.decay_begins, _decay_begins(newest))
        raise SpecError(
            f"{spec.run_dir}: cannot become {spec.steps} steps long, for the learning rate of its "
            f"{length} steps depends on the length from step {begins} on and the oldest checkpoint is of "
            f"step {read_manifest(found[-1]).step}; train such a run from the start, under another name",
        )
    return kept


def _fits(path: Path, spec: TrainSpec) -> bool:
    try:
        manifest = read_manifest(path)
        same = manifest.spec["steps"] == spec.steps
        return same or manifest.step <= min(spec.steps, spec.decay_begins, _decay_begins(manifest))
    except (CheckpointError, KeyError, TypeError, ValidationError):
        return True


def _decay_begins(manifest: CheckpointManifest) -> int:
    stored = manifest.spec
    schedule = ScheduleSpec(**{k: v for k, v in stored["schedule"].items() if k in ScheduleSpec.model_fields})
    return int(stored["steps"]) - schedule.phases(stored["steps"], stored.get("begun_with_steps"))[1]
