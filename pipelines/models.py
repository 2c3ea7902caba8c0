"""Find the exported model that a person means."""

from __future__ import annotations

from pathlib import Path

from manifests.spec import preset_names
from pipelines.run import local_job
from trainer.specbase import SpecError


def find(source: str, workdir: Path) -> Path:
    """The export directory that `source` names.

    Args:
        source: an export directory, a run directory, a run's name below `workdir`, a preset or a job file.

    Raises:
        SpecError: nothing of that name, or its model has not been exported.
    """
    named = workdir / "checkpoints" / "runs" / source
    if source in preset_names() or Path(source).is_file():
        run_dir = Path(local_job(source, {}, target="local", workdir=workdir)[0].run_dir)
    elif named.is_dir():
        run_dir = named
    elif Path(source).is_dir():
        run_dir = Path(source)
    else:
        raise SpecError(f"'{source}' is no run below {named.parent}, no directory, preset or job file; check the name")
    for directory in (run_dir / "export", run_dir):
        if (directory / "model.safetensors").is_file():
            return directory
    raise SpecError(f"{run_dir} holds no exported model; export it first: yaongi run JOB, or yaongi export JOB")
