"""Check from JSON and digests, without torch, whether a task has finished and its artefact is intact.

Each task writes its JSON file last, so a missing file means unfinished; a file of another checkpoint or other settings
means that the task must run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from manifests.spec import JobSpec
from trainer.checkpoints.checkpoint import CheckpointFile, describe_files, latest, read_manifest
from trainer.data.manifest import StageResult
from trainer.evaluatespec import measured
from trainer.evaluation.scores import rows
from trainer.evaluation.tasks import TASK_FILES, files_digest
from trainer.recording.results import read_json

Task = Literal["train", "evaluate", "export"]
NUMBERS = ("steps", "tokens", "loss_first", "loss_last", "tokens_per_second", "seconds")


def finished(job: JobSpec, task: Task) -> StageResult | None:
    """The verified result of `task` in the run directory; None if it must run (again).

    Raises:
        CheckpointError: the artefact is damaged.
    """
    return {"train": _trained, "evaluate": _evaluated, "export": _exported}[task](job)


def _trained(job: JobSpec) -> StageResult | None:
    result = read_json(Path(job.run_dir) / "result.json", (*NUMBERS, "checkpoint_digest"))
    if result is None or result["steps"] != job.train.steps:
        return None
    checkpoint = latest(job.run_dir)
    if checkpoint is None or (manifest := read_manifest(checkpoint)).digest != result["checkpoint_digest"]:
        return None
    summary = {name: result[name] for name in NUMBERS if result[name] is not None}  # a skipped step has no loss
    return StageResult(kind="train", path=str(checkpoint), digest=manifest.digest, summary=summary)


def _evaluated(job: JobSpec) -> StageResult | None:
    path = Path(job.run_dir) / "eval.json"
    result = read_json(path, ("checkpoint_digest", "settings", "domains"))
    if (
        result is None
        or not path.with_name("report.html").is_file()
        or result["checkpoint_digest"] != _checkpoint_digest(job)
    ):
        return None
    spec = job.train_spec().evaluate
    if result["settings"] != measured(spec):
        return None
    own = spec.task_files if spec.benchmarks else None
    if own is not None and Path(own).is_dir() and result.get(TASK_FILES) != files_digest(own):
        return None  # a task was changed
    summary = {f"bits_per_byte_{domain}": value["bits_per_byte"] for domain, value in result["domains"].items()}
    summary |= {row.name: row.value for row in rows(result)}
    return StageResult(kind="evaluate", path=str(path), digest=result["checkpoint_digest"], summary=summary)


def _exported(job: JobSpec) -> StageResult | None:
    directory = Path(job.run_dir) / "export"
    manifest = read_json(directory / "manifest.json", ("checkpoint_digest", "files"))
    if manifest is None or manifest["checkpoint_digest"] != _checkpoint_digest(job):
        return None
    if manifest.get("transformers_dtype", "bf16") != job.train.exporting.dtype:
        return None
    expected = {name: CheckpointFile.model_validate(entry) for name, entry in manifest["files"].items()}
    missing = [name for name in expected if not (directory / name).is_file()]
    changed = missing or [n for n, entry in describe_files(directory, expected).items() if entry != expected[n]]
    if changed:
        print(f"export: {directory / changed[0]} is not what was written; exporting again", flush=True)
        return None
    size = sum(entry.bytes for entry in expected.values())
    return StageResult(
        kind="export", path=str(directory), digest=manifest["checkpoint_digest"], summary={"bytes": size}
    )


def _checkpoint_digest(job: JobSpec) -> str | None:
    checkpoint = latest(job.run_dir)
    return read_manifest(checkpoint).digest if checkpoint else None
