"""Find the run that the user means: by name, beginning of a name, directory, preset or job file.

A run has the same name everywhere (`JobSpec.run_name`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from manifests.spec import preset_names
from trainer.errors import SpecError

CANDIDATES_SHOWN = 8


class UnknownRun(SpecError):
    """No run has a name that begins with the given text."""


def named(text: str, workdir: Path) -> str | None:
    """The run's name if `text` is a run directory, a preset or a job file; None if it can only be a name.

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
    """The one of `names` that equals `text`, or the only one that begins with it.

    Args:
        where: the place that was searched, for the message.
        exactly: the run of the preset or job file `text`; needed because runs with other settings may also begin with
            a preset's name.

    Raises:
        UnknownRun, SpecError: none, or several; lists candidates.
    """
    if exactly is not None and exactly in names:
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


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - CANDIDATES_SHOWN} more" if len(names) > CANDIDATES_SHOWN else ""
    return ", ".join(names[:CANDIDATES_SHOWN]) + more
