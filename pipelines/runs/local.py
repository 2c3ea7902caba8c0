"""Runs of this machine, found by their run directories and by the process records of a workdir."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from manifests.spec import JobSpec, job_from
from pipelines import background
from pipelines.background import Process
from pipelines.options import again, command
from pipelines.runs import locallogs
from pipelines.runs.names import UnknownRun, choose, named
from pipelines.runs.standing import of_directory
from pipelines.runs.view import View
from trainer.checkpoints.checkpoint import latest_step
from trainer.errors import LaunchError
from trainer.exitcodes import STOPS
from trainer.process.limits import LEASE
from trainer.recording.results import read_json
from trainer.recording.trackers.state import links
from trainer.specbase import changes_from_sets, read_yaml
from trainer.thismachine import PORTS_FILE

RUN_FILES = ("job.yaml", "train.yaml", "checkpoints")  # a run directory has at least one of them


@dataclass(frozen=True)
class LocalRun:
    """A run of this machine; it has no directory while its data is still being prepared."""

    name: str
    directory: Path
    workdir: Path

    def job(self) -> JobSpec | None:
        """The job of the last start; None if neither the run directory nor the workdir has it."""
        for file in (self.directory / "job.yaml", background.job_file(self.workdir, self.name)):
            if file.is_file():
                return _stored(file)
        return None

    def view(self) -> View:
        alive = background.is_alive(self.workdir, self.name)  # first: a run that ends in between would look killed
        process, log = background.read(self.workdir, self.name), locallogs.newest(self.workdir, self.name)
        if alive:
            state, why = _running(process, log)
        else:
            state, why = (
                ("running", f"in step tune of {base.name}") if (base := self._tuner()) else self._ended(process)
            )
        rows = [("directory", str(self.directory))]
        if process:
            rows.append(("process", f"{process.pid} on {process.host}, started in {process.cwd}"))
        if log:
            rows.append(("log", str(log)))
        rows += links(self.directory).items()
        if alive and (served := _ports(self.directory, log, process)):
            rows.append(("metrics", served))
        return View(self.name, "here", state, why, of_directory(self.directory), rows)

    def show_logs(self, console: Console, *, follow: bool, rank: int | None, task: str) -> None:
        locallogs.show(self, self.directory, self.workdir, console, follow=follow, rank=rank, task=task)

    def _tuner(self) -> LocalRun | None:
        """The run in whose step `tune` this one is trained now."""
        for file in background.folder(self.workdir).glob("*.yaml"):
            if file.stem != self.name and background.is_alive(self.workdir, file.stem):
                job = _stored(file)
                if job.tune and job.tuning().run_name == self.name:
                    return LocalRun(file.stem, self.directory.parent / file.stem, self.workdir)
        return None

    def stop(self, write: Callable[[str], None]) -> str:
        if not background.is_alive(self.workdir, self.name) and (base := self._tuner()):
            return base.stop(write)
        job, name, place = self.job(), self.name, again(self.workdir)
        directory = Path(job.run_dir) if job else self.directory  # on the cluster's volume if it trains there
        before = latest_step(directory)

        def present() -> str:
            log = locallogs.newest(self.workdir, name)
            return locallogs.present_step(background.read(self.workdir, name), log)

        ended = background.stop(self.workdir, name, present, write)
        if ended.code == 0:
            return f"run {name} finished before it could be stopped; see: yaongi status {name}{place}"
        step = latest_step(directory)
        new = "checkpoint saved" if step > before else "the newest checkpoint is"
        saved = f"{new} at step {step}" if step else "it has no checkpoint yet"
        return f"stopped {name}; {saved}; continue: yaongi resume {name}{place}"

    def resume(self, sets: Sequence[str], write: Callable[[str], None]) -> str:
        job, name = self.job(), self.name
        if base := self._tuner():
            raise LaunchError(
                f"run {name} is already running, in step tune of {base.name}; follow it: yaongi logs {base.name} "
                f"--follow{again(self.workdir)}"
            )
        if job is None:
            raise LaunchError(
                f"run {name}: neither {self.directory} nor {self.workdir} holds its job; start it: "
                f"yaongi local JOB{again(self.workdir)}"
            )
        if (self.directory / LEASE).exists():
            from components.launch.lease import held

            with held(self.directory):  # refuses while a launcher is alive
                pass
        if sets:
            from components.plan.length import changed

            job = changed(job, changes_from_sets(sets), name)
        if _is_finished(job):
            return f"run {name} is finished: {job.train.steps:,} steps, model in {self.directory / 'export'}"
        process = background.read(self.workdir, name)
        cwd = Path(process.cwd) if process else Path.cwd()
        return started(background.start(job, self.workdir, cwd), self.workdir)

    def why(self) -> str:
        now = self.view()
        return f"{now.name}, on this machine, is {now.state}" + (f": {now.why}" if now.why else "")

    def _ended(self, process: Process | None) -> tuple[str, str]:
        go_on = f"continue: yaongi resume {self.name}{again(self.workdir)}"
        exported = self.directory / "export" / "manifest.json"
        done = read_json(self.directory / "result.json") is not None and exported.is_file()
        if process and done and process.ended and process.ended < exported.stat().st_mtime:
            return "finished", ""  # in step tune of another run, after its own process ended
        if process is None:
            return ("finished", "") if done else ("idle", f"no process drives it from {self.workdir}; {go_on}")
        if process.ended is None:
            return (
                "killed",
                f"its process {process.pid} ended without a report, as after kill -9 or out of memory; {go_on}",
            )
        if process.code == 0:
            return "finished", ""
        if process.code in STOPS:
            return "stopped", go_on
        return "failed", process.error


def _stored(file: Path) -> JobSpec:
    # Unless it says otherwise, relative paths in it start where the job was started, not here.
    return job_from({"storage": {"sources_dir": None}}, read_yaml(file), str(file))


def local_runs(workdir: Path) -> dict[str, LocalRun]:
    """All runs that the workdir knows, by name."""
    root = workdir / "checkpoints" / "runs"
    names = {path.name for path in root.glob("*") if any((path / file).exists() for file in RUN_FILES)}
    names |= {name for path in background.folder(workdir).glob("*.json") if background.read(workdir, name := path.stem)}
    return {name: LocalRun(name, root / name, workdir) for name in sorted(names)}


def find(text: str, workdir: Path) -> LocalRun:
    """The run that `text` means.

    Raises:
        UnknownRun, SpecError: none, or several.
    """
    path = Path(text)
    if path.is_dir() and (path / "job.yaml").is_file():
        return LocalRun(path.resolve().name, path, workdir)
    runs, exactly = local_runs(workdir), named(text, workdir)
    try:
        return runs[choose(text, runs, f"in {workdir}", exactly)]
    except UnknownRun as unknown:
        if exactly is None:
            raise
        raise UnknownRun(f"{unknown}; begin it: {command('run', text, workdir)}") from None


def started(process: Process, workdir: Path) -> str:
    """The message for a run that was started in the background."""
    place = again(workdir)
    return (
        f"run {process.run} runs in the background (process {process.pid})\n"
        f"follow it: yaongi logs {process.run} --follow{place}; how far: yaongi status{place}; "
        f"end it: yaongi stop {process.run}{place}"
    )


def _running(process: Process | None, log: Path | None) -> tuple[str, str]:
    step = locallogs.present_step(process, log)
    return "running", f"in step {step}" if step else "starting"


def _ports(directory: Path, log: Path | None, process: Process | None) -> str:
    """Where to scrape a running run: its ranks once they train, and its steps if they moved to another port."""
    served, file = [], directory / PORTS_FILE
    if file.is_file() and (process is None or file.stat().st_mtime >= process.started):
        ports = (read_json(file) or {}).get("ports", [])
        served += [f"rank {rank}: port {port}" for rank, port in enumerate(ports) if port]
    moved = locallogs.moved_port(process, log)
    return ", ".join([*served, *([f"steps: port {moved}"] if moved else [])])


def _is_finished(job: JobSpec) -> bool:
    """Whether all tasks of a run are done, judged by the files in its directory."""
    from components.launch.artefacts import Task, finished

    return all(finished(job, task) for task in get_args(Task))
