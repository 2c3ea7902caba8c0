"""`yaongi quantize`: an exported model with weights in INT8 or FP8."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.options import Workdir
from pipelines.verify import Export

if TYPE_CHECKING:
    from trainer.quantise import Made, Measure

MIB = 2**20
COLUMNS = ("text", "bits per byte before", "after", "difference", "perplexity before", "after", "difference")


class Kind(StrEnum):
    INT8 = "int8"
    FP8 = "fp8"


class Weights(StrEnum):
    """Of `yaongi generate`."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


def quantize(
    source: Export,
    to: Annotated[Kind, typer.Option(help="Numbers of the large weights, with a scale for each output channel.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: beside the export, with -int8 or -fp8 after its name."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure with this UTF-8 text instead of the run's held-out text."),
    ] = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Write an exported model with weights in INT8 or FP8, and print what that changes on held-out text."""
    from pipelines.models import find

    directory = find(source, workdir)
    from trainer.quantise import run

    measure = _measure(directory, text)
    show(run(directory, output or directory.with_name(f"{directory.name}-{to.value}"), to.value, measure), Console())


def _measure(directory: Path, text: Path | None) -> Measure:
    """
    Raises:
        SpecError: no text was given, and the export does not lie in a run whose shards are here.
    """
    from trainer.errors import SpecError
    from trainer.quantise import on_heldout, on_text
    from trainer.spec import TrainSpec
    from trainer.specbase import parse, read_yaml

    if text is not None:
        return on_text(text)
    file = directory.resolve().parent / "train.yaml"
    spec = parse(TrainSpec, read_yaml(file), str(file)) if file.is_file() else None
    if spec is None or not Path(spec.tokens.shards).is_dir():
        raise SpecError(f"{directory}: the held-out text of its run is not here; give a text: --text FILE")
    return on_heldout(spec)


def show(made: Made, console: Console) -> None:
    from trainer.quantise import rows

    table = Table(box=None, pad_edge=False)
    for n, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if n else "left")
    for row in rows(made.before, made.after):
        table.add_row(*row)
    if not console.is_terminal:
        console.width = 120
    console.print(table, markup=False, highlight=False)
    share = made.bytes_after / made.bytes_before
    print(
        f"wrote {made.folder}: weights of {made.bytes_after / MIB:,.1f} MiB instead of "
        f"{made.bytes_before / MIB:,.1f} MiB ({share:.0%})"
    )
