"""Compile the pipeline and its components for Kubeflow Pipelines.

python -m pipelines.compile           the committed `pretrain.yaml` and components/catalogue (tests compare them)
python -m pipelines.compile FOLDER    the catalogue only, with the image of YAONGI_PIPELINE_IMAGE
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import components
from components.quick import quick_imports
from trainer.files import atomic_write

COMMITTED = Path(__file__).with_name("pretrain.yaml")
CATALOGUE = Path(components.__file__).with_name("catalogue")
# Component → the package that defines it, in the order of a run.
CATALOGUED = {
    "plan": "plan",
    "data": "data",
    "download": "download",
    "hygiene": "hygiene",
    "tokenizer": "tokenizer",
    "encode": "shards",
    "shards": "shards",
    "train": "launch",
    "evaluate": "launch",
    "export": "export",
    "tune": "tune",
    "cleanup": "cleanup",
}


def compiled() -> str:
    """The pipeline as YAML for Kubeflow Pipelines."""
    with quick_imports():
        from pipelines.pretrain import pretrain

    return _yaml(pretrain)


def catalogue() -> dict[str, str]:
    """Each component as YAML, by its name."""
    with quick_imports():
        return {
            name: _yaml(getattr(import_module(f"components.{package}.component"), name))
            for name, package in CATALOGUED.items()
        }


def _yaml(what: Any) -> str:
    with quick_imports():
        from kfp import compiler

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "compiled.yaml"
        compiler.Compiler().compile(what, str(file))
        return file.read_text(encoding="utf-8")


def write(path: Path) -> None:
    atomic_write(path, compiled().encode())


def write_catalogue(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in catalogue().items():
        atomic_write(folder / f"{name}.yaml", text.encode())


if __name__ == "__main__":
    if sys.argv[1:]:
        write_catalogue(Path(sys.argv[1]))
        print(f"wrote {len(CATALOGUED)} components to {sys.argv[1]}")
    else:
        write(COMMITTED)
        write_catalogue(CATALOGUE)
        print(f"wrote {COMMITTED.name} and {len(CATALOGUED)} components")
