"""`yaongi verify` and `yaongi sign`: compare an exported model with its passport; sign a passport afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.options import Workdir

if TYPE_CHECKING:
    from pipelines.checks import Check

Export = Annotated[
    str,
    typer.Argument(metavar="EXPORT", help="An exported model's folder, or a run's name or directory, or a job."),
]


def verify(
    source: Export,
    key: Annotated[str, typer.Option(metavar="PUBLIC.pem", help="Demand a signature by this key.")] = "",
    workdir: Workdir = Path("work"),
) -> None:
    """Check an exported model: its files, the data and run that it comes from, and its signature."""
    from pipelines.checks import BAD, checks
    from pipelines.models import find
    from trainer import signing
    from trainer.errors import CheckpointError

    directory = find(source, workdir)
    found = checks(directory, signing.public_key(key) if key else None)
    show(found)
    if bad := [check for check in found if check.mark == BAD]:
        raise CheckpointError(f"{directory} does not verify: {bad[0].what}: {bad[0].detail}")


def sign(source: Export, workdir: Workdir = Path("work")) -> None:
    """Sign the passport of an exported model with the private key whose path is in YAONGI_SIGNING_KEY."""
    from pipelines.checks import BAD, of_files
    from pipelines.models import find
    from trainer import passport, signing
    from trainer.errors import CheckpointError, SpecError

    by = signing.signer()
    if by is None:
        raise SpecError(f"{signing.VARIABLE} is not set; set it to the path of a private key ({signing.MAKE})")
    directory = find(source, workdir)
    content, data = passport.read(directory / passport.PASSPORT)
    if (files := of_files(directory, content)).mark == BAD:
        raise CheckpointError(f"{directory} is not signed: {files.detail}")
    key_id = signing.sign(directory, content, data, by)
    print(f"signed {directory / passport.PASSPORT} with key {key_id}: {directory / signing.ENVELOPE}")


def show(found: list[Check]) -> None:
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in found:
        table.add_row(check.mark, check.what, check.detail)
    if not console.is_terminal:
        console.width = max(80, *(len(check.detail) + 24 for check in found))
    console.print(table, markup=False, highlight=False)
