"""A stage of the data path for a step: open the data of a result, and find reusable parts of a directory.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.data.manifest import MANIFEST_NAME, Kind, Manifest, StageResult, read_manifest, verify
from trainer.errors import DataError


def reusable(
    directory: str | Path,
    kind: Kind,
    inputs: dict[str, str],
    settings: dict[str, Any],
) -> tuple[Manifest | None, str]:
    """The manifest of `directory` if it is intact and was made from these inputs and settings, else None; and the
    reason.

    A directory that has grown since then also qualifies.
    """
    if not (Path(directory) / MANIFEST_NAME).exists():
        return None, "not made yet"
    try:
        manifest = read_manifest(directory, kind)
        if not any(generation.inputs == inputs for generation in manifest.generations):
            return None, "its inputs changed"
        if manifest.settings != settings:
            return None, "its settings changed"
        verify(directory, manifest)
    except DataError as error:
        return None, str(error)
    return manifest, "unchanged and verified"


def whole_part(
    directory: str | Path,
    kind: Kind,
    made_from: Sequence[dict[str, str]],
    settings: dict[str, Any],
    *,
    sizes_only: bool = False,
) -> Manifest | None:
    """The newest intact generation of `directory` that was made with these settings from these inputs, if any.

    Args:
        made_from: the inputs of each expected generation, oldest first.
    """
    try:
        there = read_manifest(directory, kind)
    except DataError:
        return None
    for part in reversed(there.parts):
        chain = [*(generation.inputs for generation in part.earlier), part.inputs]
        if part.settings == settings and chain == list(made_from[: len(chain)]):
            with suppress(DataError):
                verify(directory, part, sizes_only=sizes_only)
                return part
    return None


def withdraw(directory: str | Path, stays: Manifest | None) -> None:
    """Remove the manifest, which declares a directory finished, unless it lists only files that are kept."""
    with suppress(DataError):
        if stays is not None and read_manifest(directory) == stays:
            return
    (Path(directory) / MANIFEST_NAME).unlink(missing_ok=True)


def open_stage(result: StageResult) -> Manifest:
    """The manifest of a previous step's result, after a check that its files exist with the right sizes.

    For a directory that has grown since then, it is the generation of the result.

    Raises:
        DataError: the data does not match the result.
    """
    manifest = read_manifest(result.path).at(result.digest)
    if manifest is None or manifest.kind != result.kind:
        raise DataError(f"{result.path}: changed since the step before finished; run the pipeline again")
    verify(result.path, manifest, sizes_only=True)
    return manifest
