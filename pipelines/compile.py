"""Compile the pipeline; `python -m pipelines.compile` writes the committed `pretrain.yaml` (a test compares them)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from components.quick import quick_imports
from trainer.files import atomic_write

COMMITTED = Path(__file__).with_name("pretrain.yaml")


def compiled() -> str:
    """The pipeline as YAML for Kubeflow Pipelines."""
    with quick_imports():
        from kfp import compiler

        from pipelines.pretrain import pretrain

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pretrain.yaml"
        compiler.Compiler().compile(pretrain, str(file))
        return file.read_text(encoding="utf-8")


def write(path: Path) -> None:
    atomic_write(path, compiled().encode())


if __name__ == "__main__":
    write(COMMITTED)
    print(f"wrote {COMMITTED.name}")
