"""Inputs of a command that another command makes; if one is missing, the error names that command in full."""

from __future__ import annotations

from pathlib import Path

from manifests.spec import JobSpec, StageName
from pipelines.options import command
from trainer.data.manifest import MANIFEST_NAME
from trainer.errors import DataError

# The option of `prepare` that stops after a stage; by default it stops after the shards.
UNTIL: dict[StageName, tuple[str, ...]] = {
    "raw": ("--until", "download"),
    "hygiene": ("--until", "hygiene"),
    "tokenizers": ("--until", "tokenizer"),
    "shards": (),
}


def stage(name: StageName, spec: JobSpec, job: str, sets: list[str] | None, workdir: Path) -> Path:
    """The directory of a finished stage.

    Args:
        job, sets, workdir: as the user gave them, for the command in the message.

    Raises:
        DataError: the stage does not exist.
    """
    directory = Path(spec.stage_dir(name))
    if not (directory / MANIFEST_NAME).is_file():
        first = command("prepare", job, workdir, sets, *UNTIL[name])
        raise DataError(f"{directory / MANIFEST_NAME}: not there; make it first: {first}")
    return directory
