"""Checkpoints as files: names, digests, atomic publication, verification, choice of the one to resume from.

A checkpoint is a directory `checkpoints/step-00000040` of torch.distributed.checkpoint files plus `checkpoint.json`,
which describes them, with the size and digest of each. It is written under a hidden name, fsynced and renamed, so a
directory with a visible name is complete; `LATEST` names the newest. `verify` checks that its bytes are unchanged.
Imports no torch: launchers call `latest` and `verify` from an image without it; `trainer.checkpoints.checkpointer`
handles the tensors.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.errors import CheckpointError
from trainer.fields import Stored, tell_unknown
from trainer.files import atomic_write, checksum, sync_directory

if TYPE_CHECKING:
    pass

FORMAT = 1
MANIFEST = "checkpoint.json"
LATEST = "LATEST"
SKIPPED_IN_A_ROW = "skipped_in_a_row"  # scalar: number of consecutive skipped steps before the checkpoint

log = logging.getLogger(__name__)


class CheckpointFile(Stored):
    bytes: int
    xxh3_128: str


class CheckpointManifest(Stored):
    """Contents of checkpoint.json. `digest`, the sha256 of all other fields, identifies the checkpoint."""

    format: int = FORMAT
    step: int
    spec: dict[str, Any]
    code_version: str
    digests: dict[str, str]
    cursor: dict[str, Any]
    world_size: int
    scalars: dict[str, float]
    files: dict[str, CheckpointFile]
    digest: str = ""

    def content_digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True, separators=(",", ":"))
        return sha256(text.encode()).hexdigest()


def step_dir(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def unfinished_dir(run_dir: str | Path, step: int) -> Path:
    """The directory in which the checkpoint of `step` is written before it is published."""
    return Path(run_dir) / "checkpoints" / f".unfinished-step-{step:08d}"


def published(run_dir: str | Path) -> list[Path]:
    """Checkpoint directories of the run, newest first, without reading them. Copies under other names are ignored."""
    found = (Path(run_dir) / "checkpoints").glob("step-*")
    ours = (path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
    return sorted(ours, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(path.name.removeprefix("step-"))


def latest_step(run_dir: str | Path) -> int:
    """The step in LATEST, without reading the checkpoint itself; 0 if there is none."""
    try:
        name = (Path(run_dir) / "checkpoints" / LATEST).read_text(encoding="utf-8").strip()
        return int(name.removeprefix("step-"))
    except (OSError, ValueError):
        return 0


MEGATRON_FOLDER, MEGATRON_TRACKER = "megatron", "latest_checkpointed_iteration.txt"  # of train.engine megatron


def megatron_step(run_dir: str | Path) -> int:
    """The step of Megatron's newest checkpoint in this run; 0 if there is none."""
    try:
        return int((Path(run_dir) / MEGATRON_FOLDER / MEGATRON_TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint to resume from: the one in LATEST, else the newest older one that verifies.

    Returns:
        None when the run has no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none that LATEST allows verifies.
    """
    return first_whole(candidates(run_dir), verify)


def candidates(run_dir: str | Path) -> list[Path]:
    """Checkpoints to resume from, the one in LATEST first, then older ones, without reading them.

    Newer ones are excluded, because a person may have set LATEST back on purpose. Without a readable LATEST all
    qualify.

    Raises:
        CheckpointError: LATEST allows none of those that exist.
    """
    found = existing = published(run_dir)
    if existing and (step := latest_step(run_dir)):
        found = [path for path in existing if step_of(path) <= step]
    if existing and not found:
        raise CheckpointError(
            f"{Path(run_dir) / 'checkpoints' / LATEST} names step {step}, which is not there, nor is an older one; "
            f"write {existing[0].name} into it to resume from the newest",
        )
    return found


def first_whole(found: list[Path], check: Callable[[Path], object]) -> Path | None:
    """The first of `candidates` in which `check` finds no damage; None if there are no candidates.

    Raises:
        CheckpointError: there are candidates, but all are damaged.
    """
    problems = []
    for path in found:
        try:
            check(path)
        except CheckpointError as error:
            problems.append(str(error))
            if len(problems) < len(found):
                log.error("%s; trying the next older checkpoint", error)
            elif len(found) > 1:  # the error below names only the first
                log.error("%s", error)
            continue
        if problems:
            log.error("resuming from %s instead of %s: the steps between are trained again", path, found[0].name)
        return path
    if not found:
        return None
    raise CheckpointError(
        f"{found[0].parent}: none of {len(found)} checkpoints verifies ({problems[0]}); "
        "restore one from a copy, or move the directory away to train from the start",
    )


def read_manifest(path: str | Path) -> CheckpointManifest:
    """checkpoint.json of a checkpoint directory, verified by its own digest.

    Raises:
        CheckpointError: it is missing, not readable or changed.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = CheckpointManifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise _damaged(file, f"is not what was written ({error.errors()[0]['msg']})") from None
    if manifest.format != FORMAT:
        raise _damaged(
            file, f"has format {manifest.format} of yaongi {manifest.code_version}, this version reads {FORMAT}"
        )
    if manifest.content_digest() != manifest.digest:
        raise _damaged(file, "is not what was written (its digest differs)")
    tell_unknown(manifest, str(file))
    return manifest


def verify(path: str | Path, share: tuple[int, int] = (0, 1)) -> CheckpointManifest:
    """Compare every file of a checkpoint with checkpoint.json; files are read in parallel.

    Args:
        share: (k, n) reads only every n-th file, from the k-th on; names and sizes are always compared.

    Raises:
        CheckpointError: naming the first damaged or missing file.
    """
    manifest = read_manifest(path)
    try:
        _compare(Path(path), manifest, share)
    except OSError as error:  # an unreadable file counts as missing
        raise _damaged(Path(error.filename or path), f"cannot be read ({error.strerror})") from None
    return manifest


def _compare(directory: Path, manifest: CheckpointManifest, share: tuple[int, int]) -> None:
    foreign = sorted(entry for entry in directory.iterdir() if entry.name not in {*manifest.files, MANIFEST})
    for entry in foreign if share[0] == 0 else ():
        if not entry.name.startswith("."):  # .nfs…, .DS_Store and the like are harmless
            _warn_of(entry)
    for name, expected in manifest.files.items():
        if not (directory / name).is_file():
            raise _damaged(directory / name, "is missing")
        size = (directory / name).stat().st_size
        if size != expected.bytes:
            raise _damaged(directory / name, f"has {size} bytes, {expected.bytes} were written")
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for name, actual in describe_files(directory, by_size[share[0] :: share[1]]).items():
        if actual != manifest.files[name]:
            raise _damaged(directory / name, f"differs from what was written (xxh3 {actual.xxh3_128})")


@cache
def _warn_of(foreign: Path) -> None:
    """Warn once per process about an extra file; the checkpoint is complete without it."""
    log.warning("%s does not belong to the checkpoint; ignored", foreign)


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, CheckpointFile]:
    """Size and digest of files; hashing releases the GIL, so threads run in parallel."""
    names = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _describe(directory / name), names), strict=True))


def _describe(file: Path) -> CheckpointFile:
    return CheckpointFile(bytes=file.stat().st_size, xxh3_128=checksum(file, "xxh3_128"))


def publish(run_dir: str | Path, manifest: CheckpointManifest) -> Path:
    """Make the finished hidden directory of `manifest.step` the run's newest checkpoint.

    The manifest is written last, everything is fsynced, one rename makes it visible, then LATEST is updated.
    Checkpoints of later steps belong to a branch that was abandoned by going back to an older one; they are deleted.
    """
    hidden, visible = unfinished_dir(run_dir, manifest.step), step_dir(run_dir, manifest.step)
    complete(hidden, manifest)
    if visible.exists():  # the step was trained again after a fallback to an older checkpoint
        _remove(visible)
    hidden.rename(visible)
    sync_directory(visible.parent)
    atomic_write(visible.parent / LATEST, visible.name.encode() + b"\n")
    for path in published(run_dir):
        if step_of(path) > manifest.step:
            _remove(path)
    return visible


def complete(directory: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest, with its digest, as the last file of a checkpoint directory."""
    signed = manifest.model_copy(update={"digest": manifest.content_digest()})
    atomic_write(directory / MANIFEST, signed.model_dump_json(indent=1).encode())


def prune(run_dir: str | Path, keep_last: int, decay_begins: int = 0, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints, but never the one in LATEST.

    A checkpoint saved within a series of skipped steps does not displace another, because a person may have to go back
    before the series: it is kept if it is the newest, or if there is room. The newest checkpoint at or before step
    `decay_begins` is kept too, because the run can be lengthened from there; and those of the steps `in_use`, which are
    being read.
    """
    step, found = latest_step(run_dir), published(run_dir)
    every_sound = [path for path in found if not _in_a_row(path)]
    sound, stable = every_sound[:keep_last], [path for path in every_sound if step_of(path) <= decay_begins][:1]
    kept = list(dict.fromkeys([*found[:1], *sound, *found]))[: max(keep_last, len({*found[:1], *sound}))]
    for path in found:
        if path not in [*kept, *stable] and step_of(path) not in (step, *in_use):
            _remove(path)


def _in_a_row(path: Path) -> bool:
    """Whether a checkpoint was saved within a series of skipped steps; True if its manifest cannot be read."""
    try:
        return read_manifest(path).scalars.get(SKIPPED_IN_A_ROW, 0) > 0
    except CheckpointError:
        return True


def newest_until(run_dir: str | Path, step: int) -> Path | None:
    """The newest checkpoint at or before `step`, without reading it; None if there is none."""
    return next((path for path in published(run_dir) if step_of(path) <= step), None)


def how_to_go_back(path: Path | None) -> str:
    """Instructions to continue the run from the checkpoint `path`; None: there is none."""
    if path is None:
        return "there is no earlier checkpoint; train from the start, in another run"
    return f"to go on from {path.name}, the newest checkpoint from before, write its name into {path.parent / LATEST}"


def unfinished(run_dir: str | Path) -> Iterator[Path]:
    """Directories that a killed process left partly written or partly deleted."""
    return (Path(run_dir) / "checkpoints").glob(".*step-*")


def clean_unfinished(run_dir: str | Path) -> None:
    """Remove what is `unfinished`."""
    for path in unfinished(run_dir):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it is hidden first, so that a crash leaves no damaged one with a visible name.

    If that fails, it only warns: an operation that needs the name fails by itself.
    """
    # A unique name: NFS may keep a file of an earlier one (.nfs…) as long as a process reads it.
    doomed = path.with_name(f".deleted-{time.time_ns()}-{path.name}")
    try:
        path.rename(doomed)
    except OSError as error:
        log.warning("the old checkpoint %s cannot be deleted (%s)", path, error.strerror)
    shutil.rmtree(doomed, ignore_errors=True)


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {file.parent.name}: {file} {what}")
