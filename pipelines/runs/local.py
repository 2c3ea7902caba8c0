"""Find the run that a person means: by name, beginning of a name, directory, preset or job file.

Runs are known from the run directories, from the processes that this workdir has started, and from the jobs of a
cluster; names of all three are the same (`JobSpec.run_name`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from manifests.spec import JobSpec, job_from, preset_names
from pipelines import background
from pipelines.options import command
from trainer.specbase import SpecError, read_yaml

CANDIDATES_SHOWN = 8
RUN_FILES = ("job.yaml", "train.yaml", "checkpoints")  # of which a run directory has one at least


class UnknownRun(SpecError):
    """No run begins with what was given."""


@dataclass(frozen=True)
class Run:
    """A run of this machine; it may not have a directory yet, when its data is still being prepared."""

    name: str
    directory: Path
    workdir: Path

    def job(self) -> JobSpec | None:
        """The job as it was started last; None when neither the run directory nor the workdir holds it."""
        for file in (self.directory / "job.yaml", background.job_file(self.workdir, self.name)):
            if file.is_file():
                # Relative paths in it start where it was started, not here, unless it says otherwise.
                return job_from({"storage": {"sources_dir": None}}, read_yaml(file), str(file))
        return None


def local_runs(workdir: Path) -> dict[str, Run]:
    """All runs that the workdir knows, by name."""
    root = workdir / "checkpoints" / "runs"
    names = {path.name for path in root.glob("*") if any((path / file).exists() for file in RUN_FILES)}
    names |= {name for path in background.folder(workdir).glob("*.json") if background.read(workdir, name := path.stem)}
    return {name: Run(name, root / name, workdir) for name in sorted(names)}


def named(text: str, workdir: Path) -> str | None:
    """The run's name where `text` is a run directory, a preset or a job file; None if it can only be a name.

    Raises:
        SpecError: a job file with a wrong field.
    """
    from pipelines.run import local_job

    if text in preset_names() or Path(text).is_file():
        return local_job(text, {}, target="local", workdir=workdir)[0].run_name
    path = Path(text)
    if path.is_dir() and (path / "job.yaml").is_file():
        return path.resolve().name
    return None


def choose(text: str, names: Collection[str], where: str, exactly: str | None = None) -> str:
    """The one of `names` that `text` is, or that alone begins with it.

    Args:
        where: where was looked, for the message.
        exactly: the run of the preset or job file that `text` is. A preset's name may be the beginning of a run of
            other settings, too.

    Raises:
        UnknownRun, SpecError: none, or several; lists candidates.
    """
    if exactly in names:
        return exactly
    if text in names:
        return text
    found = [name for name in sorted(names) if name.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(f"'{text}' is the beginning of several runs: {_listed(found)}; give more of the name")
    known = f"known: {_listed(sorted(names))}" if names else "none is known"
    raise UnknownRun(f"no run '{text}' {where}; {known}")


def find(text: str, workdir: Path) -> Run:
    """The local run that `text` means.

    Raises:
        UnknownRun, SpecError: none, or several.
    """
    path = Path(text)
    if path.is_dir() and (path / "job.yaml").is_file():
        return Run(path.resolve().name, path, workdir)
    runs, exactly = local_runs(workdir), named(text, workdir)
    try:
        return runs[choose(text, runs, f"in {workdir}", exactly)]
    except UnknownRun as unknown:
        if exactly is None:
            raise
        raise UnknownRun(f"{unknown}; begin it: {command('run', text, workdir)}") from None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - CANDIDATES_SHOWN} more" if len(names) > CANDIDATES_SHOWN else ""
    return ", ".join(names[:CANDIDATES_SHOWN]) + more
