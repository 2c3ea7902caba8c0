"""`train.export.folder`: the exported models of a run under the names that tools of transformers expect.

    initial_model  checkpoint-500  final_model  model_info.json  training_info.json

A link leads to the export's folder for transformers, where there is one; our own commands find the export around it.
Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from trainer.errors import VolumeError
from trainer.exported import TRANSFORMERS, digest, final_dir, step_dir, steps
from trainer.files import atomic_write, replace_link
from trainer.report.run import read_run
from trainer.spec import TrainSpec

INITIAL, FINAL = "initial_model", "final_model"
MODEL_INFO, TRAINING_INFO = "model_info.json", "training_info.json"
_OURS = re.compile(rf"{INITIAL}|{FINAL}|checkpoint-\d+")

log = logging.getLogger(__name__)


def show(spec: TrainSpec) -> None:
    """Bring the links and the files of facts in `train.export.folder` up to date; nothing without that field.

    Links of these names to other runs are removed, as a folder shows one run. What is not a link stays.

    Raises:
        VolumeError: the folder cannot be written.
        CheckpointError: a file of the run is damaged.
    """
    if spec.exporting.folder is None:
        return
    folder = Path(spec.exporting.folder)
    wanted = {f"checkpoint-{step}" if step else INITIAL: step_dir(spec.run_dir, step) for step in steps(spec.run_dir)}
    if digest(final_dir(spec.run_dir)) is not None:
        wanted[FINAL] = final_dir(spec.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in list(folder.iterdir()):
            if _OURS.fullmatch(entry.name) and entry.is_symlink() and entry.name not in wanted:
                entry.unlink()
        for name, export in wanted.items():
            inner = export / TRANSFORMERS
            _link(folder / name, inner if inner.is_dir() else export)
        for name, facts in ((MODEL_INFO, _of_model(spec)), (TRAINING_INFO, _of_training(spec, list(wanted)))):
            atomic_write(folder / name, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise VolumeError(
            f"train.export.folder {folder}: cannot be written ({error.strerror}); free space, or name another folder"
        ) from None


def _link(link: Path, target: Path) -> None:
    """A relative link."""
    if link.exists() and not link.is_symlink():
        log.warning("%s is no link of ours and stays; the model is in %s", link, target)
        return
    replace_link(link, os.path.relpath(target.resolve(), link.parent.resolve()))


def _of_model(spec: TrainSpec) -> dict[str, Any]:
    model = spec.model
    return {
        "run": spec.run,
        "parameters": read_run(spec.run_dir).parameters,
        "layers": len(model.layers),
        "hidden": model.hidden,
        "vocab_size": model.vocab_size,
        "seq_len": max(spec.tokens.seq_lens),
        "dtype": spec.exporting.dtype,
    }


def _of_training(spec: TrainSpec, names: list[str]) -> dict[str, Any]:
    """What is known now; `result` is that of result.json, null before the end."""
    run = read_run(spec.run_dir)
    last = run.steps[-1] if run.steps else {}
    return {
        "run": spec.run,
        "run_dir": spec.run_dir,
        "planned_steps": spec.steps,
        "step": last.get("step", 0),
        "tokens": run.tokens,
        "loss": last.get("loss"),
        "learning_rate": last.get("learning_rate"),
        "seed": spec.seed,
        "sources": {name: mix.weight for name, mix in spec.tokens.mix.items()},
        "exports": names,
        "result": run.result,
    }
