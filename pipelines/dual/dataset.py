"""Find the text that `--dataset-path` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.download.readers import KNOWN, split_suffix
from manifests.paths import whole
from trainer.errors import DataError

PREFERRED = "mixed_pretraining.jsonl"
USUAL = (".", "data", "dataset", "datasets")  # folders in which PREFERRED is looked for without --dataset-path


@dataclass(frozen=True)
class Dataset:
    """Files with text; none: the sample corpus shipped with yaongi. `said`: one line about the choice."""

    files: tuple[Path, ...]
    said: str


def find(given: Path | None, *, train: bool) -> Dataset:
    """The files of `--dataset-path`, or of the usual places.

    Args:
        train: a real run, which does not replace a dataset that is not there by the sample corpus.

    Raises:
        DataError: a file of an unknown format, a folder without text; in a real run also a path that is not there.
    """
    if given is None:
        for folder in USUAL:
            if (file := Path(folder) / PREFERRED).is_file():
                return Dataset((whole(file),), f"{file}")
        places = ", ".join(USUAL)
        return Dataset((), f"the sample corpus: no --dataset-path, and no {PREFERRED} in {places}")
    if given.is_file():
        split_suffix(given.name)
        return Dataset((whole(given),), f"{given}")
    if given.is_dir():
        return _in_folder(given)
    if train:
        raise DataError(
            f"--dataset-path {given}: there is no such file or folder; check the path, or leave it out for the sample "
            "corpus"
        )
    return Dataset((), f"the sample corpus: --dataset-path {given} is not there")


def _in_folder(folder: Path) -> Dataset:
    if (file := folder / PREFERRED).is_file():
        return Dataset((whole(file),), f"{file}")
    files = _texts(sorted(path for path in folder.rglob("*") if path.is_file()), folder)
    if not files:
        raise DataError(
            f"--dataset-path {folder}: the folder has no text; put {PREFERRED} there, or other files of {KNOWN}"
        )
    return Dataset(tuple(map(whole, files)), f"{len(files)} file{'s' * (len(files) > 1)} in {folder}")


def _texts(files: Sequence[Path], folder: Path) -> list[Path]:
    """Those of a known format, hidden ones excluded."""
    found = []
    for file in files:
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            split_suffix(file.name)
        except DataError:
            continue
        found.append(file)
    return found
