"""What a command needs and another one makes: where it is not there, that command is named in full."""

from __future__ import annotations

from pathlib import Path

from manifests.spec import JobSpec, StageName
from pipelines.options import command
from trainer.data.manifest import MANIFEST_NAME
from trainer.errors import DataError

# What `prepare` ends with to make a stage; it ends with the shards by itself.
UNTIL: dict[StageName, tuple[str, ...]] = {
    "raw": ("--until", "download"),
    "hygiene": ("--until", "hygiene"),
    "tokenizers": ("--until", "tokenizer"),
    "shards": (),
}


def stage(name: StageName, spec: JobSpec, job: str, sets: list[str] | None, workdir: Path) -> Path:
    """The directory of a stage that is made.

    Args:
        job, sets, workdir: as the person gave them, who has to repeat them.

    Raises:
        DataError: it is not there.
    """
    directory = Path(spec.stage_dir(name))
    if not (directory / MANIFEST_NAME).is_file():
        first = command("prepare", job, workdir, sets, *UNTIL[name])
        raise DataError(f"{directory / MANIFEST_NAME}: not there; make it first: {first}")
    return directory
