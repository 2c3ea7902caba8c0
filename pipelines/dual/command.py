"""The command `yaongi dual`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines.options import WORKDIR

if TYPE_CHECKING:
    from manifests.spec import JobSpec
    from pipelines.dual.job import Flags

PID_FILE = "dual.pid"
FIRST_SECONDS = 8.0  # of the log, shown after a start in the background
OUTPUT, LOGS = WORKDIR / "dual", WORKDIR / "dual" / "logs"


def dual(
    train: Annotated[bool, typer.Option("--train", help="The real run; else a test of 10 steps.")] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Run in this terminal, not in the background.")
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of training.", show_default="the preset's")
    ] = None,
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            help="A file of text, or a folder: its mixed_pretraining.jsonl, else all its .jsonl, .parquet, .txt, …",
            show_default="mixed_pretraining.jsonl here or in data/, else a small sample",
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Gets initial_model, checkpoint-N and final_model, which transformers loads.")
    ] = OUTPUT,
    logs_dir: Annotated[Path, typer.Option(help="Gets the logs and dual.pid, the number of the process.")] = LOGS,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows that a GPU computes at once. The tokens of a step stay about the same: more rows, fewer rounds.",
            show_default="on GPUs the most that fit",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of the matrices' optimizer, Muon.", show_default="the preset's")
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a row.", show_default="the preset's")
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    fp16: Annotated[bool, typer.Option("--fp16", help="FP16 with loss scaling instead of BF16.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="FP32 instead of BF16.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Without torch.compile.")] = False,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of this machine to use.", show_default="2, or all if fewer")
    ] = None,
    no_save_initial: Annotated[
        bool, typer.Option("--no-save-initial", help="Do not export the model before the first step.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the checks, the job and the command that is the same.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show everything, and the traceback of an error.")] = False,
) -> None:
    """Train a dense model on the two GPUs of this machine, without Kubernetes: a test of 10 steps, or --train.

    It translates its flags to a job (preset dual-h100-dense) and starts it as `yaongi local` does; --dry-run shows that
    job, and docs/dual.md each flag's field. On a machine without a GPU, two CPU processes train a small model.
    """
    from pipelines.dual import dataset
    from pipelines.dual.job import Flags
    from trainer.errors import SpecError

    if verbose:
        os.environ["YAONGI_VERBOSE"] = "1"
    if fp16 and fp32:
        raise SpecError("--fp16 and --fp32 exclude each other; give one of them, or none for the preset's precision")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise SpecError(f"--learning-rate {learning_rate:g}: a rate lies between 0 and 1; write one such as 2e-3")
    flags = Flags(
        train=train,
        dataset=dataset.find(dataset_path, train=train),
        output_dir=output_dir,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_seq_length=max_seq_length,
        save_steps=save_steps,
        precision="fp16" if fp16 else "fp32" if fp32 else None,
        compile=not no_compile,
        num_gpus=num_gpus,
        save_initial=not no_save_initial,
    )
    begin(flags, logs_dir, foreground=foreground, dry_run=dry_run, console=Console())


def begin(flags: Flags, logs_dir: Path, *, foreground: bool, dry_run: bool, console: Console) -> None:
    """Check, show, and start unless it is a dry run.

    Raises:
        ForeseenError: the flags do not fit this machine, a run of these logs is alive, or the job cannot start.
    """
    from pipelines import background
    from pipelines.doctor.findings import show
    from pipelines.dual import checks
    from pipelines.dual.job import PRESET, changes
    from pipelines.run import local_job
    from trainer.errors import LaunchError

    machine = checks.this_machine()
    fields = changes(flags, machine)
    job, _ = local_job(PRESET, fields, target="local", workdir=WORKDIR)
    pid_file = logs_dir / PID_FILE
    if not dry_run:
        _refuse_second(job, pid_file)
    console.print("environment", style="bold")
    good = show(checks.environment(flags.dataset, fields, WORKDIR), console)
    console.print("configuration", style="bold")
    checks.summary(flags, job, machine.gpus, console)
    if dry_run:
        _print_job(fields)
        return
    if not good:
        raise LaunchError("not started: the environment lacks what is marked `no` above; each line says what to do")
    link_logs(job, logs_dir)
    if foreground:
        from pipelines.run import run_here

        run_here(PRESET, fields, target="local", workdir=WORKDIR, pid_file=pid_file)
        return
    verbose = bool(os.environ.get("YAONGI_VERBOSE"))
    process = background.start(job, WORKDIR, Path.cwd(), verbose=verbose, pid_file=pid_file)
    _show_start(process, logs_dir, console)


def link_logs(job: JobSpec, logs_dir: Path) -> None:
    """In the folder of logs, links to the run's: all output, each rank's, and the folder of all details.

    Raises:
        VolumeError: it cannot be written.
    """
    from components.volume import made
    from manifests.paths import whole
    from pipelines.run import newest_log
    from trainer.errors import VolumeError
    from trainer.files import replace_link

    made(logs_dir)
    details = whole(Path(job.run_dir)) / "logs"
    links = {"console.log": newest_log(whole(WORKDIR) / "logs", job.run_name), "detail": details}
    links |= {f"rank-{rank}.log": details / f"rank-{rank}.log" for rank in range(job.cluster.world_size)}
    try:
        for name, target in links.items():
            replace_link(logs_dir / name, target)
    except OSError as error:
        raise VolumeError(
            f"--logs-dir {logs_dir}: no links can be made there ({error.strerror}); name another folder"
        ) from None


def _refuse_second(job: JobSpec, pid_file: Path) -> None:
    from pipelines import background
    from trainer.errors import LaunchError

    if (pid := background.holder(pid_file)) is not None:
        raise LaunchError(
            f"yaongi dual already runs as process {pid} ({pid_file}); look: yaongi status; to end it, with a "
            f"checkpoint: kill {pid}"
        )
    if background.is_alive(WORKDIR, job.run_name):
        raise LaunchError(f"{background.running(WORKDIR, job.run_name)}; look: yaongi status {job.run_name}")


def _print_job(fields: dict[str, Any]) -> None:
    import yaml

    from pipelines.dual.job import PRESET, as_sets

    print("\n# the job: in a file, `yaongi local FILE` starts it")
    print(yaml.safe_dump({"preset": PRESET, **fields}, sort_keys=False, allow_unicode=True, width=120))
    words = [word for each in as_sets(fields) for word in ("--set", each)]
    print(f"# or the same as one command\n{shlex.join(['yaongi', 'local', PRESET, *words])}")


def _show_start(process: Any, logs_dir: Path, console: Console) -> None:
    from pipelines import background
    from pipelines.runs import locallogs
    from trainer.errors import LaunchError

    run = process.run
    console.print(f"the first {FIRST_SECONDS:.0f} seconds of the log", style="bold")
    locallogs.show_beginning(run, WORKDIR, console, FIRST_SECONDS)
    now = background.read(WORKDIR, run)
    if now is not None and now.code:
        raise LaunchError(now.error or f"run {run} ended with exit code {now.code}", now.code)
    over = now is not None and now.code == 0
    console.print(f"run {run} " + ("is done" if over else f"runs in the background (process {process.pid})"))
    commands = {
        "look": f"yaongi status {run}",
        "follow": f"yaongi logs {run} --follow",
        "one rank": f"tail -F {logs_dir}/rank-0.log",
        "stop": f"yaongi stop {run}",
        "continue": f"yaongi resume {run}",
    }
    for what, command in commands.items():
        console.print(f"  {what + ':':10} {command}", markup=False, highlight=False, soft_wrap=True)
