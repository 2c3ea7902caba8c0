"""The checks of an exported model against its passport. Each says what it found; none ends the others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import passport, signing
from trainer.checkpoints.checkpoint import read_manifest as read_checkpoint
from trainer.checkpoints.checkpoint import step_dir
from trainer.data.manifest import Kind, read_manifest
from trainer.data.manifest import verify as verify_data
from trainer.errors import CheckpointError, DataError, ForeseenError, LaunchError
from trainer.files import checksum
from trainer.passport import PASSPORT, FileRecord, Passport
from trainer.pretrained import read_json
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

GOOD, BAD, OPEN = "✓", "✗", "–"
MANIFEST = "manifest.json"
NOT_HERE = "not here, not checked"


class Check(NamedTuple):
    """`mark` is GOOD, BAD or OPEN (nothing to check, or not checked)."""

    mark: str
    what: str
    detail: str


def checks(directory: Path, key: SSlibKey | None) -> list[Check]:
    """All checks of an export.

    Args:
        key: the public key that must have signed; None demands no signature.

    Raises:
        CheckpointError: manifest.json or the passport is damaged.
    """
    manifest = read_json(directory / MANIFEST)
    if "passport" not in manifest and not (directory / PASSPORT).exists():
        none = Check(OPEN, "passport", "none, it was exported by an earlier version")
        return [none, _of_former(directory, manifest), _unsigned(key)]
    content, data = passport.read(directory / PASSPORT)
    said = f"of {content.name}, step {content.checkpoint.step:,}, written by yaongi {content.code.version}"
    found = [Check(GOOD, "passport", said), of_files(directory, content), _of_manifest(content, manifest)]
    run_dir = directory.parent
    spec = _spec(run_dir)
    found += [_of_spec(content, spec), *_of_data(content, spec), _of_ledger(content, run_dir)]
    if content.begun_with:
        found.append(_of_first_model(content.begun_with, spec))
    if content.quantised:
        found.append(_of_whole_weights(content.quantised, run_dir))
    return [*found, _of_signature(directory, content, data, key)]


def of_files(directory: Path, content: Passport) -> Check:
    """Whether exactly the files of the passport are here, unchanged."""
    return _unchanged(directory, content.files, {PASSPORT, signing.ENVELOPE})


def _of_former(directory: Path, manifest: dict[str, Any]) -> Check:
    try:
        sums = manifest["sha256"].items()
        files = {name: FileRecord(bytes=manifest["files"][name]["bytes"], sha256=sha256) for name, sha256 in sums}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{directory / MANIFEST}: is not that of an export; export the run again") from None
    return _unchanged(directory, files, {MANIFEST})


def _unchanged(directory: Path, files: dict[str, FileRecord], others: set[str]) -> Check:
    if problem := _difference(directory, files, others):
        return Check(BAD, "files", problem)
    return Check(
        GOOD, "files", f"{len(files)} files, {sum(entry.bytes for entry in files.values()):,} bytes, unchanged"
    )


def _difference(directory: Path, files: dict[str, FileRecord], others: set[str]) -> str | None:
    """The first difference between a folder and the files that belong there, and how many more there are."""
    here = set(_present(directory))
    problems = [f"{name} is missing" for name in sorted(files.keys() - here)]
    problems += [f"{name} does not belong to the export" for name in sorted(here - files.keys() - others)]
    common = sorted(files.keys() & here)
    with ThreadPoolExecutor(4) as pool:
        problems += filter(None, pool.map(lambda name: _change(directory, name, files[name]), common))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def _present(directory: Path) -> Iterator[str]:
    """All files below a folder, and links to folders. Hidden ones, as file systems leave them, do not count."""
    for place, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*names, *links]:
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(directory).as_posix()


def _change(directory: Path, name: str, expected: FileRecord) -> str | None:
    try:
        if (size := (directory / name).stat().st_size) != expected.bytes:
            return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
        return None if checksum(directory / name, "sha256") == expected.sha256 else f"{name} was changed"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _of_manifest(content: Passport, manifest: dict[str, Any]) -> Check:
    """manifest.json, by which the export is loaded, and the passport state the same."""
    theirs = {name: entry.sha256 for name, entry in content.files.items() if name != MANIFEST}
    same = (content.name, content.checkpoint.digest, theirs) == tuple(
        manifest.get(name) for name in ("name", "checkpoint_digest", "sha256")
    )
    return Check(GOOD, "manifest", "agrees") if same else Check(BAD, "manifest", f"{MANIFEST} and {PASSPORT} disagree")


def _spec(run_dir: Path) -> TrainSpec | None:
    """The training spec of the run in which an export lies; None for an export elsewhere."""
    file = run_dir / "train.yaml"
    return parse(TrainSpec, read_yaml(file), str(file)) if file.is_file() else None


def _of_spec(content: Passport, spec: TrainSpec | None) -> Check:
    if spec is None:
        return Check(OPEN, "spec", f"train.yaml is {NOT_HERE}")
    if passport.spec_digest(spec) == content.spec.sha256:
        return Check(GOOD, "spec", f"train.yaml, {content.spec.sha256[:12]}")
    return Check(OPEN, "spec", "train.yaml is another one now; a run that was made longer has to be exported again")


def _of_data(content: Passport, spec: TrainSpec | None) -> Iterator[Check]:
    yield _of_stage("shards", spec.tokens.shards if spec else None, content.data.shards, content)
    yield _of_stage("tokenizer", spec.tokens.tokenizer if spec else None, content.data.tokenizer, content)


def _of_stage(kind: Kind, folder: str | None, digest: str | None, content: Passport) -> Check:
    if folder is None or not Path(folder).is_dir() or digest is None:
        return Check(OPEN, kind, NOT_HERE)
    return _tried(kind, lambda: _same_data(kind, folder, digest, content))


def _same_data(kind: Kind, folder: str, digest: str, content: Passport) -> str:
    """
    Raises:
        DataError: the folder holds other data, or is incomplete.
    """
    manifest = read_manifest(folder, kind)
    if (then := manifest.at(digest)) is None:
        raise DataError(f"{folder} holds {manifest.digest[:12]}, the model is from {digest[:12]}")
    verify_data(folder, then, sizes_only=True)
    for name, source in content.data.sources.items() if kind == "shards" else ():
        entry = then.sources.get(name)
        if entry is None or (entry.licence, entry.revision) != (source.licence, source.revision):
            raise DataError(f"{folder} states another licence or revision of source {name}")
    grown = "" if then.digest == manifest.digest else ", and more was appended since"
    return f"{digest[:12]}, {len(then.files)} files of the right size{grown}"


def _of_ledger(content: Passport, run_dir: Path) -> Check:
    """The trained tokens by source, in the checkpoint and in the log of the run."""
    tokens = {name: source.tokens for name, source in content.data.sources.items()}
    if content.data.tokens is None:
        return Check(OPEN, "ledger", "unknown")
    if content.data.tokens != sum(count or 0 for count in tokens.values()):
        return Check(BAD, "ledger", f"{content.data.tokens:,} tokens are not the sum of those of the sources")
    checkpoint = step_dir(run_dir, content.checkpoint.step)
    if not checkpoint.is_dir():
        return Check(OPEN, "ledger", f"the checkpoint is {NOT_HERE}")

    def same() -> str:
        found = read_checkpoint(checkpoint)
        if found.digest != content.checkpoint.digest:
            raise CheckpointError(f"{checkpoint} is another checkpoint")
        if passport.ledger(found) != tokens:
            raise CheckpointError(f"{checkpoint} states other tokens by source")
        return f"{content.data.tokens:,} tokens, as in {checkpoint.name}"

    return _tried("ledger", same)


def _of_first_model(begun: passport.BegunRecord, spec: TrainSpec | None) -> Check:
    """The passport of the model that training began with."""
    if begun.passport_sha256 is None or spec is None or spec.init_from is None:
        return Check(OPEN, "begun with", f"{begun.name}: " + (NOT_HERE if begun.passport_sha256 else "has no passport"))
    first = Path(spec.init_from)
    places = (first, first / "export", first.parent.parent / "export")  # an export, a run, a checkpoint
    there = next((place / PASSPORT for place in places if (place / PASSPORT).is_file()), None)
    if there is None:
        return Check(OPEN, "begun with", f"{begun.name}: {NOT_HERE}")
    if hashlib.sha256(there.read_bytes()).hexdigest() == begun.passport_sha256:
        return Check(GOOD, "begun with", f"{begun.name}, passport {begun.passport_sha256[:12]}")
    return Check(OPEN, "begun with", f"{begun.name} was exported again since")


def _of_whole_weights(made: passport.QuantisedRecord, run_dir: Path) -> Check:
    """The passport of the export that a quantised one was made from."""
    what, there = "made from", run_dir / "export" / PASSPORT
    if not there.is_file():
        return Check(OPEN, what, f"the export with whole weights is {NOT_HERE}")
    if hashlib.sha256(there.read_bytes()).hexdigest() == made.passport_sha256:
        return Check(GOOD, what, f"{there.parent}, passport {made.passport_sha256[:12]}")
    return Check(OPEN, what, f"{there.parent} was exported again since, or it was made from another")


def _of_signature(directory: Path, content: Passport, data: bytes, key: SSlibKey | None) -> Check:
    try:
        signed = signing.read(directory)
    except CheckpointError as error:
        return Check(BAD, "signature", str(error))
    except LaunchError as error:  # the package is missing; with a key, this was said before
        return Check(OPEN, "signature", f"there is one, not checked: {error}")
    if signed is None:
        return _unsigned(key)
    keys = ", ".join(key_id[:12] for key_id in signed.key_ids)
    if signed.statement != signing.statement(content, data):
        return Check(BAD, "signature", "it is of another passport or other files")
    if key is None:
        return Check(OPEN, "signature", f"by key {keys}; give --key PUBLIC.pem to check it")
    if key.keyid not in signed.key_ids:
        return Check(BAD, "signature", f"by key {keys}, not by key {key.keyid[:12]} of --key")
    if not signing.is_by(signed, key):
        return Check(BAD, "signature", f"invalid: key {key.keyid[:12]} did not sign this")
    return Check(GOOD, "signature", f"by key {key.keyid[:12]} ({key.scheme})")


def _unsigned(key: SSlibKey | None) -> Check:
    return Check(BAD, "signature", "there is none, and --key demands one") if key else Check(OPEN, "signature", "none")


def _tried(what: str, check: Callable[[], str]) -> Check:
    try:
        return Check(GOOD, what, check())
    except ForeseenError as error:
        return Check(BAD, what, str(error))
