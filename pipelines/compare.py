"""`yaongi compare`: results, specs and curves of several runs, as tables and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipelines.options import Workdir, command
from pipelines.verbs import WIDE

if TYPE_CHECKING:
    from trainer.differences import Difference
    from trainer.report.comparison import Result
    from trainer.report.run import Run

# Names and folders differ between any two runs.
BESIDE_JOB = {"name", "storage"}
BESIDE_TRAIN = {"run", "run_dir"}


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN…", help="Names, their beginnings, run directories, presets or jobs.")
    ],
    output: Annotated[Path, typer.Option(help="The page to write; its folder is created.", dir_okay=False)] = Path(
        "compare.html"
    ),
    workdir: Workdir = Path("work"),
) -> None:
    """Compare runs: a table of results, the differences of their specs, and a page with their curves over tokens."""
    from trainer.errors import SpecError, VolumeError
    from trainer.files import atomic_write

    if output.is_file() and not output.read_bytes().lstrip()[:9].lower().startswith(b"<!doctype"):
        raise SpecError(f"--output {output}: is a file that is no page, and would be replaced; name another")
    directories: dict[Path, str] = {}
    for text in runs:
        directory = _directory(text, workdir)
        if (other := directories.setdefault(directory.resolve(), text)) is not text:
            raise SpecError(f"'{other}' and '{text}' are the same run, {directory}; name different ones")
    if len(directories) < 2:
        raise SpecError(f"'{runs[0]}' is only one run; name at least two to compare")
    found = [_read(directory, text, workdir) for directory, text in directories.items()]
    from trainer.report.comparison import labels, render, results

    of, rows = _differences(found)
    names = labels(found)
    _show(names, results(found), of, rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, render(found, of, rows).encode())
    except OSError as error:
        raise VolumeError(f"{output}: cannot be written ({error.strerror}); choose another place by --output") from None
    print(f"\ncurves and tables: {output}")


def _directory(text: str, workdir: Path) -> Path:
    """The run directory that `text` means; a folder with train.yaml is one wherever it lies, also a copy."""
    from pipelines.runs import local

    if (Path(text) / "train.yaml").is_file():
        return Path(text)
    return local.find(text, workdir).directory


def _read(directory: Path, text: str, workdir: Path) -> Run:
    """The run, which has trained at least one step.

    Raises:
        SpecError, CheckpointError: it has not; or its files cannot be read.
    """
    from trainer.errors import SpecError
    from trainer.report.run import read_run

    run = read_run(directory) if (directory / "train.yaml").is_file() else None
    if run is None or not run.steps:
        raise SpecError(
            f"{directory}: this run has no trained step in logs/metrics.jsonl yet; train it first: "
            f"{command('resume', text, workdir)}"
        )
    return run


def _differences(runs: Sequence[Run]) -> tuple[str, list[Difference]]:
    """What is compared, the whole jobs if every run has one, and the fields that are not the same in all."""
    from manifests.spec import job_from
    from trainer.differences import differences
    from trainer.specbase import read_yaml

    files = [run.directory / "job.yaml" for run in runs]
    if all(file.is_file() for file in files):
        jobs = [job_from(read_yaml(file), where=str(file)) for file in files]
        return "job.yaml", differences([job.model_dump(mode="json", exclude=BESIDE_JOB) for job in jobs])
    specs: list[dict[str, Any]] = [run.spec.model_dump(mode="json", exclude=BESIDE_TRAIN) for run in runs]
    for spec in specs:  # of a folder with data, its name says what is in it
        spec["tokens"] |= {name: Path(spec["tokens"][name]).name for name in ("shards", "tokenizer")}
    return "train.yaml", differences(specs)


def _show(names: Sequence[str], results: Sequence[Result], of: str, differences: Sequence[Difference]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(_plain(name), justify="right", overflow="fold")
    for row in results:
        texts = [f"[green]{text}[/]" if place == row.best else text for place, text in enumerate(row.texts)]
        table.add_row(f"{_plain(row.label)} [dim]{_plain(row.unit)}[/]", *texts)
    console.print(table)
    if not differences:
        console.print(f"\nno field of {of} differs, except names and folders")
        return
    table = Table(box=None, header_style="bold")
    for title in (f"differs in {of}", *names):
        table.add_column(_plain(title), overflow="fold")
    for each in differences:
        table.add_row(*(_plain(text) for text in (each.field, *each.values)))
    console.print()
    console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
