"""`yaongi data …`: verify, stats, cat and peek for the output of the data steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.options import Job, Sets, Workdir
from trainer.errors import DataError, SpecError

if TYPE_CHECKING:
    from manifests.spec import JobSpec, StageName
    from trainer.data.inspection import Passage, SourceTotals
    from trainer.data.manifest import Manifest
    from trainer.data.plan import Cursor

HELP = """
Inspect the data of a job: is it intact, how much of each source is there, what does the model read.

    yaongi data verify tiny
    yaongi data stats tiny --plot tokens.png
    yaongi data cat tiny --source ko --first 12
    yaongi data peek tiny --step 40 --row 3
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help=HELP)

Where = Annotated[
    str,
    typer.Argument(metavar="JOB|DIRECTORY", help="A preset or job file, or a directory with a manifest.json."),
]
WIDE = 200  # characters in a table line when stdout is not a terminal
STAGES: tuple[StageName, ...] = ("raw", "hygiene", "tokenizers", "shards")


def _job(job: str, sets: list[str] | None, workdir: Path) -> JobSpec:
    from pipelines.run import local_job
    from trainer.specbase import changes_from_sets

    return local_job(job, changes_from_sets(sets or []), target="local", workdir=workdir)[0]


def _made(stage: StageName, spec: JobSpec, job: str, sets: list[str] | None, workdir: Path) -> Path:
    from pipelines import made

    return made.stage(stage, spec, job, sets, workdir)


def _shards(where: str, sets: list[str] | None, workdir: Path) -> Path:
    if Path(where).is_dir():
        return Path(where)
    return _made("shards", _job(where, sets, workdir), where, sets, workdir)


@app.command()
def verify(where: Where, sets: Sets = None, workdir: Workdir = Path("work")) -> None:
    """Read every file and compare it with its manifest; damaged files are named."""
    from trainer.data.manifest import MANIFEST_NAME, read_manifest
    from trainer.files import UnreadableError

    if Path(where).is_dir():
        directories = iter([Path(where)])
    else:
        job = _job(where, sets, workdir)
        stages = [stage for stage in STAGES if stage != "hygiene" or job.hygiene.enabled]
        directories = (_made(stage, job, where, sets, workdir) for stage in stages)  # lazily, one after another
    problems: list[DataError] = []
    for directory in directories:
        manifest = read_manifest(directory)
        found = _damage(directory, manifest)
        problems += found
        counts = manifest.counts()
        state = f"{len(found)} damaged" if found else "whole"
        print(
            f"{manifest.kind}: {counts.files} files, {counts.documents:,} documents, {counts.tokens:,} tokens, "
            f"digest {manifest.digest[:12]}: {state} ({directory / MANIFEST_NAME})"
        )
        for line in found:  # print now: a later stage may be missing, which ends the command
            print(f"damaged: {line}")
    if problems:
        first = min(problems, key=lambda error: isinstance(error, UnreadableError))  # damage is more specific
        raise type(first)(f"{len(problems)} damaged: {first}")


def _damage(directory: Path, manifest: Manifest) -> list[DataError]:
    from components.progress import ByteProgress
    from trainer.data.inspection import damage

    with ByteProgress(f"verify {manifest.kind}", sum(entry.bytes for entry in manifest.files)) as progress:
        return damage(directory, manifest, lambda entry: progress.advance(entry.bytes))


@app.command()
def stats(
    where: Where,
    sets: Sets = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw shares and document lengths: .png, .svg, .pdf.")] = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Show documents, bytes and tokens of each source, and how much it repeats itself.

    Distinct n-grams are compared in equally many tokens of each source; one far below the others is monotonous, as the
    text of a model may be.
    """
    shards = _shards(where, sets, workdir)
    rows = print_tokens(shards)
    print_distinct(shards)
    if plot:
        from pipelines.data_plot import draw

        draw(rows, plot)
        print(f"wrote {plot}")


def print_amounts(job: JobSpec, stage: str) -> None:
    """Print what a job's data steps up to `stage` made: documents, bytes and, for shards, tokens of each source."""
    from trainer.data.manifest import read_manifest

    if stage == "shards":
        print_tokens(Path(job.stage_dir("shards")))
        return
    raw = read_manifest(Path(job.stage_dir("raw")), "raw")
    table = Table(title=f"Text by source ({job.stage_dir('raw')})", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    table.add_column("licence")
    for title in ("documents", "bytes of text"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, source in raw.sources.items():
        counts = raw.counts(name)
        table.add_row(f"{name} ({source.domain})", source.licence, f"{counts.documents:,}", f"{counts.text_bytes:,}")
    _whole_lines().print(table, crop=False)
    if stage != "download" and job.hygiene.enabled:
        hygiene = Path(job.stage_dir("hygiene"))
        newest = read_manifest(hygiene, "hygiene").files[-1].path  # the report for people
        print(f"what training leaves out, and why: {hygiene / newest}")


def print_tokens(shards: Path) -> list[SourceTotals]:
    """Print the table of a shards directory; returns its rows."""
    from trainer.data.inspection import totals
    from trainer.data.manifest import read_manifest

    rows = totals(shards, read_manifest(shards, "shards"))
    _whole_lines().print(_table(rows, shards), crop=False)
    return rows


def print_distinct(shards: Path) -> None:
    """Print the shares of distinct n-grams of a shards directory."""
    from trainer.data.distinct import distinct_of
    from trainer.data.manifest import read_manifest

    size, found = distinct_of(shards, read_manifest(shards, "shards"))
    title = f"Distinct 1-, 2- and 3-grams in {size:,} tokens of each source"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    for n in (1, 2, 3):
        table.add_column(f"distinct-{n}", justify="right", no_wrap=True)
    for name, shares in found.items():
        table.add_row(name, *(f"{share:.3f}" for share in shares))
    _whole_lines().print(table, crop=False)


def _whole_lines() -> Console:
    """A console that does not wrap lines written to a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def _table(rows: list[SourceTotals], directory: Path) -> Table:
    import numpy as np

    caption = "document: tokens of the median, p99 and longest"
    table = Table(title=f"Tokens by source ({directory})", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True)
    table.add_column("licence")
    for title in ("documents", "train tokens", "share", "held-out", "bytes/token", "document"):
        table.add_column(title, justify="right", no_wrap=True)
    total = sum(row.train_tokens for row in rows)
    for row in rows:
        middle, late, longest = np.percentile(row.lengths, [50, 99, 100]) if len(row.lengths) else (0, 0, 0)
        table.add_row(
            f"{row.name} ({row.domain})",
            row.licence,
            f"{row.documents:,}",
            f"{row.train_tokens:,}",
            f"{row.train_tokens / max(1, total):.1%}",
            f"{row.heldout_tokens:,}",
            f"{row.text_bytes / max(1, row.tokens):.2f}",
            f"{middle:,.0f} / {late:,.0f} / {longest:,.0f}",
        )
    table.add_section()
    documents, heldout = sum(row.documents for row in rows), sum(row.heldout_tokens for row in rows)
    ratio = sum(row.text_bytes for row in rows) / max(1, total + heldout)
    table.add_row("all", "", f"{documents:,}", f"{total:,}", "", f"{heldout:,}", f"{ratio:.2f}", "")
    return table


@app.command()
def cat(
    where: Where,
    source: Annotated[str, typer.Option(help="Name of the source.")],
    first: Annotated[int, typer.Option(min=0, help="Number of the first document, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many documents.")] = 1,
    heldout: Annotated[bool, typer.Option("--heldout", help="Read the held-out split.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory, when a shards directory is given.")
    ] = None,
    sets: Sets = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Print documents of the shards as text, each with the place of its raw line."""
    from trainer.data.inspection import documents
    from trainer.data.manifest import Split, read_manifest, verify
    from trainer.data.tokenizer import Tokenizer

    if Path(where).is_dir():
        directory = Path(where)
        if tokenizer is None:
            raise SpecError("a shards directory alone has no tokenizer; add --tokenizer DIRECTORY, or name the job")
    else:
        job = _job(where, sets, workdir)
        directory = _made("shards", job, where, sets, workdir)
        tokenizer = tokenizer or _made("tokenizers", job, where, sets, workdir)
    manifest = read_manifest(directory, "shards")
    made_with = read_manifest(tokenizer, "tokenizer")
    if made_with.digest != manifest.inputs.get("tokenizer"):
        raise SpecError(f"{tokenizer}: not the tokenizer that {directory} was made with; name that one")
    verify(tokenizer, made_with)
    split: Split = "heldout" if heldout else "train"
    for passage in documents(directory, manifest, Tokenizer.load(tokenizer), source, split, first, count):
        _show(passage)


@app.command()
def peek(
    job: Job,
    step: Annotated[int, typer.Option(min=1, help="Training step, from 1 as in the logs.")] = 1,
    row: Annotated[int, typer.Option(min=0, help="Row of the step, from 0.")] = 0,
    sets: Sets = None,
    workdir: Workdir = Path("work"),
) -> None:
    """Print one training sequence with its document boundaries and the origin of each document."""
    from trainer.data.inspection import training_row

    spec = _job(job, sets, workdir)
    train = spec.train_spec()
    if step > train.steps:
        raise SpecError(f"the job has {train.steps} steps; there is no step {step}")
    _made("shards", spec, job, sets, workdir)
    _made("tokenizers", spec, job, sets, workdir)
    reached = _reached(spec.run_dir, step - 1)
    passages = training_row(train.tokens, train.batch.tokens_per_step, step - 1, row, reached)
    length = sum(passage.stop - passage.start for passage in passages)
    Console().print(f"step {step}, row {row}: {length} tokens of {len(passages)} documents", style="bold")
    for passage in passages:
        _show(passage)


def _reached(run_dir: str, step: int) -> tuple[int, Cursor] | None:
    """Step and cursor of the run's last checkpoint at or before `step`, if any, so that the walk starts there."""
    from trainer.checkpoints import checkpoint
    from trainer.data.plan import Cursor

    kept = [checkpoint.read_manifest(path) for path in checkpoint.published(run_dir)]
    found = max((manifest for manifest in kept if manifest.step <= step), key=lambda m: m.step, default=None)
    return (found.step, Cursor.from_dict(found.cursor)) if found and found.cursor else None


def _show(passage: Passage) -> None:
    console = Console(soft_wrap=True, highlight=False)
    part = "" if passage.stop - passage.start == passage.length else f", tokens {passage.start} to {passage.stop}"
    part += "" if passage.trained is None else f", {passage.trained} trained"
    origin = f" ← {passage.origin.path} at byte {passage.origin.offset:,}" if passage.origin else ""
    head = f"── {passage.source} #{passage.document} ({passage.length} tokens{part}){origin}"
    console.print(Text(head, style="bold cyan"))
    console.print(Text(passage.text))
