"""Run the pipeline on this machine under kfp.local: the same object that Kubeflow Pipelines executes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from components.plan.length import continued
from components.plan.step import arguments_for, runnable_here
from components.volume import made
from manifests.paths import whole
from manifests.spec import JobSpec, changes_of, job_from
from pipelines.options import command
from pipelines.progress import Watcher
from pipelines.stopping import Stop, Stopped
from trainer.checkpoints.checkpoint import step_dir
from trainer.errors import LaunchError, SpecError
from trainer.exitcodes import of_process
from trainer.fields import stored
from trainer.files import replace_link
from trainer.process import launcher
from trainer.specbase import deep_merge


def local_job(
    preset_or_file: str,
    changes: dict[str, Any],
    *,
    target: str,
    workdir: Path,
    tuning: bool = False,
    sets: list[str] | None = None,
) -> tuple[JobSpec, dict[str, Any]]:
    """The job and the pipeline's arguments for a run driven by this machine.

    Args:
        preset_or_file: a preset's name or a job file.
        changes: the fields of `--set`.
        target: where the trainer runs, "local" or "kubernetes".
        workdir: folder for both directory trees of a local run. A run on Kubernetes needs the volumes mounted here at
            the same paths as in its pods, so it keeps the spec's own directories.
        tuning: run the job of the section `tune` instead.

    Raises:
        SpecError: the spec is wrong, or its directories cannot be written here.
    """
    preset, wanted = changes_of(preset_or_file)
    wanted = deep_merge(deep_merge(wanted, changes), {"cluster": {"target": target}})
    if target == "local":
        root = whole(workdir)
        places = {"datasets_dir": f"{root}/datasets", "checkpoints_dir": f"{root}/checkpoints"}
        wanted = deep_merge({"storage": places}, wanted)
    job = job_from({"preset": preset} if preset else {}, wanted, preset_or_file)
    if tuning:
        job = continued(job)
        where = () if target == "local" else ("--target", target)
        _refuse_untrained(job, command("run", preset_or_file, workdir, sets, *where))
        job = job.tuning()
        preset, wanted = "", stored(job)
    job = continued(job)
    if job.train.begun_with_steps:
        wanted = deep_merge(wanted, {"train": {"begun_with_steps": job.train.begun_with_steps}})
    runnable_here(job)
    for name in ("datasets_dir", "checkpoints_dir"):
        _require_writable(f"storage.{name}", Path(getattr(job.storage, name)), target)
    return job, arguments_for(preset, wanted)


def run_here(
    preset_or_file: str,
    changes: dict[str, Any],
    *,
    target: str,
    workdir: Path,
    tuning: bool = False,
    sets: list[str] | None = None,
    pid_file: Path | None = None,
) -> None:
    """`yaongi run`: the whole pipeline, driven by this process, then its results.

    Args: as `local_job`; `pid_file`, if any, has this process's number meanwhile.

    Raises:
        ForeseenError: the job is wrong, cannot work here, is driven by another process, or a step failed.
    """
    from components.summary.step import read_run
    from pipelines.background import driving, keeping_number
    from pipelines.summary import show

    console, verbose = Console(), bool(os.environ.get("YAONGI_VERBOSE"))
    spec, arguments = local_job(preset_or_file, changes, target=target, workdir=workdir, tuning=tuning, sets=sets)
    with keeping_number(pid_file), driving(spec, workdir):
        if target == "local":
            from pipelines.ports import written
            from pipelines.refusals import refuse, remarks

            refuse(spec, written(preset_or_file, changes))
            for line in remarks(spec):
                print(f"warning: {line}", file=sys.stderr)
        log = run_pipeline(spec, arguments, logs=workdir / "logs", console=console, verbose=verbose)
    for each in (spec, *([spec.tuning()] if spec.tune else [])):
        show(read_run(each.run_dir), log, console, workdir, chat=each.train.evaluate.chat)


def newest_log(logs: Path, run: str) -> Path:
    """A link in the folder of logs that leads to the one of the run's last start."""
    return logs / f"{run}.log"


def _refuse_untrained(job: JobSpec, first: str) -> None:
    """The run to tune must be trained, unless `tune` names another model.

    Args:
        first: the command that trains it.
    """
    if job.tune and not job.tune.init_from and not step_dir(job.run_dir, job.train.steps).is_dir():
        what = f"run {job.run_name}, which is to be tuned, has no checkpoint of step {job.train.steps}"
        raise SpecError(f"{what}; train it first: {first}")


def _require_writable(field: str, directory: Path, target: str) -> None:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        fix = "give another --workdir" if target == "local" else "the volume must be writable for this user"
        raise SpecError(f"{field}: {directory} cannot be written here; {fix}")


def run_pipeline(
    job: JobSpec, arguments: dict[str, Any], *, logs: Path, console: Console, verbose: bool = False, until: str = ""
) -> Path:
    """Execute the pipeline with `arguments` and show its steps; returns the log file in `logs` with the full output.

    Args:
        until: the data stage after which it stops; "" for none.

    Raises:
        LaunchError: a step failed; the message names it and the reason.
        Stopped: SIGINT or SIGTERM ended it before its last step was done.
    """
    log_path = made(logs) / f"{job.run_name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    replace_link(newest_log(logs, job.run_name), Path(log_path.name))
    with tempfile.TemporaryDirectory(prefix="yaongi-") as scratch, log_path.open("w", encoding="utf-8") as log:
        file = Path(scratch) / "arguments.json"
        file.write_text(json.dumps(arguments), encoding="utf-8")
        command = [
            sys.executable,
            "-u",
            "-m",
            "pipelines.execute",
            str(file),
            f"{scratch}/outputs",
            *([until] if until else []),
        ]
        stop = Stop(Path(scratch))
        environment = os.environ | {"TMPDIR": scratch} | launcher.named() | stop.environment
        environment |= {"YAONGI_VERBOSE": "1"} if verbose else {}
        watcher = Watcher(console, log, verbose=verbose)
        # A new session puts all child processes in one group, so that a signal reaches them and nothing else.
        with (
            stop.handled(),
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            ) as child,
        ):
            stop.reaches(child)
            assert child.stdout is not None
            watcher.follow(child.stdout)
            code = of_process(child.wait())
    if code and stop.received:
        raise Stopped(128 + stop.received[0])
    if code:
        line = watcher.failure or watcher.last_line
        raise LaunchError(f"{line or f'the pipeline ended with exit code {code}'} (full log: {log_path})", watcher.code)
    return log_path
