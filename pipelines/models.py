"""Find the exported model that the user names."""

from __future__ import annotations

from pathlib import Path

from pipelines.options import command
from pipelines.runs import local
from pipelines.runs.names import named
from trainer.errors import SpecError
from trainer.exported import around


def find(source: str, workdir: Path) -> Path:
    """The export directory that `source` names: itself, the one around a folder for transformers (also by a link), or
    that of a run (found by `local.find`).

    Raises:
        SpecError: no such run, or its model has not been exported.
    """
    if (export := around(Path(source))) is not None:
        return export
    for directory in (Path(source), Path(source) / "export"):
        if (directory / "model.safetensors").is_file():
            return directory
    run = local.find(source, workdir)
    if not (run.directory / "export" / "model.safetensors").is_file():
        verb, what = ("run", source) if not Path(source).is_dir() and named(source, workdir) else ("resume", run.name)
        raise SpecError(f"{run.directory} holds no exported model; make it first: {command(verb, what, workdir)}")
    return run.directory / "export"
