"""Where the exported models of a run are.

    <run_dir>/export                  the final model, of the newest checkpoint, once it has passed the gates
    <run_dir>/exports/step-00000500   that of a checkpoint during training; of step 0, the model before the first step

Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.files import read_object

MANIFEST, TRANSFORMERS = "manifest.json", "transformers"


def final_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "export"


def step_dir(run_dir: str | Path, step: int) -> Path:
    """The export of the checkpoint of `step` that was made during training."""
    return Path(run_dir) / "exports" / f"step-{step:08d}"


def steps(run_dir: str | Path) -> list[int]:
    """The steps of which there are such exports; a visible one is complete."""
    found = (Path(run_dir) / "exports").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def digest(directory: Path) -> str | None:
    """The digest of the checkpoint that an export was made from; None if there is no export."""
    return read_object(directory / MANIFEST).get("checkpoint_digest")


def around(folder: Path) -> Path | None:
    """The export to which a folder for transformers belongs; None if it is not part of one."""
    export = folder.resolve().parent
    inside = folder.resolve().name == TRANSFORMERS
    return export if inside and read_object(export / MANIFEST).get("transformers") == TRANSFORMERS else None
