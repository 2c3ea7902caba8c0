"""The passport of an exported model: what it was made from, how, and the digest of every file, in `passport.json`.

It lies beside the files and names all of them, also manifest.json; nothing but a signature (trainer/signing.py) names
it. So an export without one is still read, and an evaluation after the export changes no file of it. What is not known
is null. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

import trainer
from trainer.checkpoints.checkpoint import CheckpointManifest
from trainer.data.manifest import Manifest, first_problem, read_manifest
from trainer.data.plan import Cursor
from trainer.energy import estimate
from trainer.errors import CheckpointError, DataError, ForeseenError
from trainer.evaluation import scores
from trainer.fields import Stored, stored, version_of
from trainer.files import checksum
from trainer.pretrained import find
from trainer.spec import TrainSpec
from trainer.specbase import canonical_json, read_yaml

if TYPE_CHECKING:
    from trainer.report.run import Run

FORMAT = 1
PASSPORT = "passport.json"
# Fields of a TrainSpec that are places, or do not change what a run computes.
PLACES = frozenset({"run_dir", "init_from", "parallel", "runtime", "evaluate", "export"})


class FileRecord(Stored):
    bytes: int = Field(ge=0)
    sha256: str


class CodeRecord(Stored):
    """The code that wrote the export; `sha256` is that of `code_digest`."""

    version: str
    sha256: str
    python: str
    torch: str | None


class SpecRecord(Stored):
    """`sha256`: of the canonical JSON of the training spec without PLACES; `version`: the lowest that knows it."""

    sha256: str
    version: int


class CheckpointRecord(Stored):
    """`code_version`: of the process that saved it, so of the last part of the training."""

    step: int
    digest: str
    code_version: str


class ImageRecord(Stored):
    """The trainer's image as the job names it; `digest` only if the name is pinned by one."""

    name: str
    digest: str | None


class BegunRecord(Stored):
    """The model that training began with. `digest`: of the checkpoint, or the commit on the Hub; `passport_sha256`: of
    the passport of its export."""

    name: str
    digest: str | None
    passport_sha256: str | None


class SourceRecord(Stored):
    """`weight`: share in the mix; `tokens`: trained on; `documents`: for training, in the shards; rest: SourceEntry."""

    weight: float
    tokens: int | None
    documents: int | None
    domain: str | None
    licence: str | None
    origin: str | None
    revision: str | None


class DataRecord(Stored):
    """Digests of the manifests of shards and tokenizer; `inputs`: those from which the shards were made."""

    shards: str | None
    inputs: dict[str, str] | None
    tokenizer: str | None
    tokens: int | None
    sources: dict[str, SourceRecord]


class TrainingRecord(Stored):
    """`device`: as CUDA names it, or cpu; `devices`: ranks of the last part; `hours`: wall time of all processes."""

    steps: int
    hours: float | None
    devices: int
    device: str | None
    energy: dict[str, Any]


class QuantisedRecord(Stored):
    """Weights of low precision. `passport_sha256`: of the passport of the export that they were made from, whose
    evaluation this one states; `measured`: held-out text before and after."""

    weights: str
    passport_sha256: str
    measured: dict[str, Any]


class Passport(Stored):
    format: int
    name: str
    parameters: int
    code: CodeRecord
    spec: SpecRecord
    checkpoint: CheckpointRecord
    image: ImageRecord | None
    begun_with: BegunRecord | None
    data: DataRecord
    training: TrainingRecord
    evaluation: dict[str, Any] | None
    files: dict[str, FileRecord]
    quantised: QuantisedRecord | None = None

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"'{name}' leaves the export")
        return files


def write(directory: Path, spec: TrainSpec, checkpoint: CheckpointManifest, manifest: dict[str, Any], run: Run) -> None:
    """Write the passport of an export whose other files are complete.

    Args:
        spec: of the training.
        manifest: the content of the export's manifest.json.
    """
    passport = Passport(
        format=FORMAT,
        name=manifest["name"],
        parameters=manifest["parameters"],
        code=_code(),
        spec=SpecRecord(sha256=spec_digest(spec), version=version_of(spec)),
        checkpoint=CheckpointRecord(
            step=checkpoint.step, digest=checkpoint.digest, code_version=checkpoint.code_version
        ),
        image=_image(run.directory),
        begun_with=_begun_with(spec),
        data=_data(spec, checkpoint),
        training=_training(checkpoint, run),
        evaluation=_evaluation(run.evaluation, checkpoint),
        files=_files(directory, manifest),
    )
    _store(directory, passport)


def write_quantised(directory: Path, source: Path, manifest: dict[str, Any], measured: dict[str, Any]) -> None:
    """Write the passport of a quantised export whose other files are complete.

    Args:
        source: the folder of the export that it was made from, with a passport.
        manifest: the content of its own manifest.json.

    Raises:
        CheckpointError: the source's passport is damaged.
    """
    content, data = read(source / PASSPORT)
    made = QuantisedRecord(
        weights=manifest["weights"], passport_sha256=hashlib.sha256(data).hexdigest(), measured=measured
    )
    changed = {"code": _code(), "files": _files(directory, manifest), "quantised": made}
    _store(directory, content.model_copy(update=changed))


def _store(directory: Path, passport: Passport) -> None:
    text = json.dumps(passport.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    (directory / PASSPORT).write_text(text, encoding="utf-8")


def _files(directory: Path, manifest: dict[str, Any]) -> dict[str, FileRecord]:
    """All files of an export, from its manifest, and the manifest itself."""
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    listed = {name: FileRecord(bytes=sizes[name], sha256=sha256) for name, sha256 in manifest["sha256"].items()}
    own = directory / "manifest.json"
    files = listed | {own.name: FileRecord(bytes=own.stat().st_size, sha256=checksum(own, "sha256"))}
    return dict(sorted(files.items()))


def _code() -> CodeRecord:
    return CodeRecord(
        version=trainer.__version__, sha256=code_digest(), python=platform.python_version(), torch=_torch()
    )


def read(path: Path) -> tuple[Passport, bytes]:
    """A passport, and its bytes.

    Raises:
        CheckpointError: it is missing, damaged or of a later format.
    """
    try:
        data = path.read_bytes()
        value = json.loads(data)
        found = value["format"]
        if isinstance(found, int) and found > FORMAT:
            raise CheckpointError(
                f"{path}: written by a later yaongi (format {found}, this one reads {FORMAT}); use that version or a "
                "newer one"
            )
        return Passport.model_validate(value), data
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); export the run again") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a passport ({first_problem(error)}); export the run again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a passport; export the run again") from None


def spec_digest(spec: TrainSpec) -> str:
    """sha256 of a training spec without PLACES, the same on every machine."""
    fields = stored(spec, PLACES)
    fields["tokens"] = {name: value for name, value in fields["tokens"].items() if name not in ("shards", "tokenizer")}
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def code_digest() -> str:
    """sha256 over the lines "<sha256> <path>" of all Python files of the package trainer, sorted by path.

    The same for a checkout, a wheel and an image of one version."""
    root = Path(trainer.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    lines = "".join(f"{checksum(root / name, 'sha256')} {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def ledger(checkpoint: CheckpointManifest) -> dict[str, int] | None:
    """Trained tokens by source; None if the checkpoint has no cursor."""
    return Cursor.from_dict(checkpoint.cursor).trained if checkpoint.cursor else None


def _torch() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _image(run_dir: Path) -> ImageRecord | None:
    """The image that the run's job names; None if the job last ran without one, on a machine."""
    file = run_dir / "job.yaml"
    cluster = read_yaml(file).get("cluster", {}) if file.is_file() else {}
    if cluster.get("target") != "kubernetes" or not cluster.get("image"):
        return None
    return ImageRecord(name=cluster["image"], digest=cluster["image"].partition("@")[2] or None)


def _begun_with(spec: TrainSpec) -> BegunRecord | None:
    if spec.init_from is None:
        return None
    try:
        found = find(spec.init_from)
    except ForeseenError:  # it is no longer here
        return BegunRecord(name=spec.begun_with, digest=None, passport_sha256=None)
    digest, export = found.digest or None, found.folder
    if found.kind == "checkpoint":
        export = found.folder.parents[1] / "export"
    elif found.kind == "transformers":
        digest = _commit(found.folder)
    passport, sha256 = export / PASSPORT, None
    if passport.is_file():
        content, data = read(passport)
        if content.checkpoint.digest == digest:  # a run may have gone on since its export
            sha256 = hashlib.sha256(data).hexdigest()
    return BegunRecord(name=spec.begun_with, digest=digest, passport_sha256=sha256)


def _commit(folder: Path) -> str | None:
    """The commit of a model from the Hub; None for another folder."""
    try:
        return read_manifest(folder, "model").inputs.get("commit")
    except DataError:
        return None


def _data(spec: TrainSpec, checkpoint: CheckpointManifest) -> DataRecord:
    shards, trained = _shards(spec, checkpoint), ledger(checkpoint)
    sources = {}
    for name, mix in spec.tokens.mix.items():
        entry = shards.sources.get(name) if shards else None
        sources[name] = SourceRecord(
            weight=mix.weight,
            tokens=trained.get(name) if trained else None,
            documents=shards.counts(name, "train").documents if shards else None,
            domain=entry.domain if entry else None,
            licence=entry.licence if entry else None,
            origin=entry.origin if entry else None,
            revision=entry.revision if entry else None,
        )
    return DataRecord(
        shards=checkpoint.digests.get("shards"),
        inputs=shards.inputs if shards else None,
        tokenizer=checkpoint.digests.get("tokenizer"),
        tokens=sum(trained.values()) if trained else None,
        sources=sources,
    )


def _shards(spec: TrainSpec, checkpoint: CheckpointManifest) -> Manifest | None:
    """The manifest of the shards as they were for this checkpoint; None if they are not here."""
    try:
        return read_manifest(spec.tokens.shards, "shards").at(checkpoint.digests.get("shards", ""))
    except DataError:
        return None


def _training(checkpoint: CheckpointManifest, run: Run) -> TrainingRecord:
    seconds, devices, result = _seconds(checkpoint, run), checkpoint.world_size, run.result or {}
    device = result.get("device") if result.get("checkpoint_digest") == checkpoint.digest else None
    return TrainingRecord(
        steps=checkpoint.step,
        hours=None if seconds is None else round(seconds / 3600, 6),
        devices=devices,
        device=device,
        energy=estimate(device, devices, seconds),
    )


def _seconds(checkpoint: CheckpointManifest, run: Run) -> float | None:
    """Wall time of all processes; of a run that did not record it, without steps that were trained again."""
    if run.processes:
        return sum(seconds for name, seconds in run.goodput.items() if name != "down")
    return checkpoint.scalars.get("seconds")


def _evaluation(evaluation: dict[str, Any] | None, checkpoint: CheckpointManifest) -> dict[str, Any] | None:
    """The scores of eval.json; None if it is of another checkpoint. Not its settings, which may name places."""
    if evaluation is None or evaluation["checkpoint_digest"] != checkpoint.digest:
        return None
    found: dict[str, Any] = {name: evaluation[name] for name in ("domains", "all", "harness") if name in evaluation}
    if judged := scores.judged_by(evaluation):
        found["judge"] = judged
    return found | {"benchmarks": [row._asdict() for row in scores.rows(evaluation)]}
