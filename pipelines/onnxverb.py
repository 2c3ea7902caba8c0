"""`yaongi onnx`: write an exported model as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import Workdir
from pipelines.verify import Export


def onnx(
    source: Export,
    output: Annotated[
        Path | None, typer.Argument(help="Folder to write; default: beside the export, with -onnx after its name.")
    ] = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Write an exported dense decoder (attention and MLP) as ONNX, with a cache, in FP32."""
    from pipelines.models import find

    directory = find(source, workdir)
    from trainer.onnxexport import run

    print(f"wrote {run(directory, output or directory.with_name(f'{directory.name}-onnx'))}")
