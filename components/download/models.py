"""Models on the Hugging Face Hub that a job starts from: their files in `models/<key>` on the datasets volume.

The first run resolves the revision to a commit and records it in the folder's manifest. Later runs keep that commit, so
that a job does not change when a branch moves. Configuration and tokenizer are downloaded first and compared with the
job before the weights, which may be hundreds of gigabytes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from components.download.hubaccess import HTTP_ERRORS, Repository, as_input, commit_of, fetch, files_of, refused
from components.download.writer import Input
from components.lock import alone
from components.pretrained import INIT, check
from components.progress import ByteProgress
from components.volume import named, volume_explained
from manifests.pretrained import HubModel, hub_model
from manifests.spec import JobSpec
from trainer.data.manifest import FileEntry, Manifest, file_entry, read_manifest, verify, write_manifest
from trainer.data.tokenizer import FILES as TOKENIZER_FILES
from trainer.errors import DataError, VolumeError
from trainer.files import sync_directory
from trainer.preflight.measured import gibibytes
from trainer.pretrained import CONFIG, find, is_weights, refuse_damaged


def fetch_models(job: JobSpec) -> None:
    """Download the models that a job names to its datasets volume, and compare them with the job.

    Raises:
        SpecError: a model does not fit.
        DataError, LaunchError, VolumeError: it cannot be fetched or stored. Finished files are kept.
    """
    hubs = {field: hub for field, name in job.named_models.items() if (hub := hub_model(name))}
    for field, hub in hubs.items():
        with named(field):
            _fetch(hub, Path(job.models[field]), weights=False)
    if job.models:
        check(job, downloaded=True)
    if INIT in hubs:
        with named(INIT):
            _fetch(hubs[INIT], Path(job.models[INIT]), weights=True)
            refuse_damaged(find(job.models[INIT]), job.train.model)


def fetch_config(hub: HubModel, folder: Path) -> None:
    """Download only the model's config.json into a folder.

    Raises:
        DataError, LaunchError: the Hub has none, or does not answer.
    """
    repository = Repository(hub.name, "model")
    commit = commit_of(repository, hub.revision)
    one = next((one for one in _listing(repository, commit, weights=False) if one.location == CONFIG), None)
    if one is None:
        raise DataError(f"{hub.name}: has no {CONFIG} at commit {commit}; name a model of transformers")
    os.replace(fetch(repository, commit, one, folder, lambda _: None), folder / CONFIG)


def _fetch(hub: HubModel, directory: Path, *, weights: bool) -> None:
    """Configuration and tokenizer of a model, or its weights too."""
    with alone(directory, "downloading a model"), volume_explained(directory):
        before = _before(directory, hub)
        if before is not None and (before.settings["weights"] or not weights):
            print(f"download: {hub.name}: unchanged, at commit {before.inputs['commit']}", flush=True)
            return
        repository = Repository(hub.name, "model")
        commit = before.inputs["commit"] if before else commit_of(repository, hub.revision)
        there = {entry.path: entry for entry in before.files} if before else {}
        wanted = [one for one in _listing(repository, commit, weights=weights) if one.location not in there]
        _check_space(hub, directory, wanted)
        with ByteProgress(f"download: {hub.name}", sum(one.bytes for one in wanted)) as progress:
            for one in wanted:
                got = fetch(repository, commit, one, directory / ".fetch", progress.advance)
                os.replace(got, directory / one.location)
                there[one.location] = _entry(directory, one)
        sync_directory(directory)
        settings = {"name": hub.name, "revision": hub.revision, "weights": weights}
        files = [there[name] for name in sorted(there)]
        write_manifest(directory, Manifest(kind="model", inputs={"commit": commit}, settings=settings, files=files))
        print(f"download: {hub.name}: {len(files)} files of commit {commit}", flush=True)


def _check_space(hub: HubModel, directory: Path, wanted: list[Input]) -> None:
    free, needed = shutil.disk_usage(directory).free, sum(one.bytes for one in wanted)
    if needed > free:
        raise VolumeError(
            f"{directory} has {gibibytes(free)} free, {hub.name} needs {gibibytes(needed)}; free space or enlarge the "
            "volume"
        )


def _before(directory: Path, hub: HubModel) -> Manifest | None:
    try:
        manifest = read_manifest(directory, "model")
        verify(directory, manifest, sizes_only=True)
    except DataError:
        return None
    same = (manifest.settings["name"], manifest.settings["revision"]) == (hub.name, hub.revision)
    return manifest if same else None


def _listing(repository: Repository, commit: str, *, weights: bool) -> list[Input]:
    try:
        files = files_of(repository, commit)
    except HTTP_ERRORS as error:
        raise refused(repository.name, error, repository.kind) from None
    names = {CONFIG, *TOKENIZER_FILES}
    chosen = [one for one in files if one.path in names or (weights and is_weights(one.path))]
    if weights and not any(one.path.endswith(".safetensors") for one in chosen):
        raise DataError(f"{repository.name}: has no safetensors files at commit {commit}; name a model that has")
    return [as_input(repository, one) for one in chosen]


def _entry(directory: Path, one: Input) -> FileEntry:
    """With the Hub's checksum if it is of a kind that we use, so that weights are not read again."""
    algorithm, _, checksum = (one.checksum or "").partition(":")
    if algorithm == "sha256":
        return FileEntry(path=one.location, bytes=one.bytes, algorithm="sha256", checksum=checksum)
    return file_entry(directory, one.location, "sha256")
