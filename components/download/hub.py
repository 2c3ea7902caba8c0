"""Sources on the Hugging Face Hub: resolve a dataset to a commit and its files, download with resume, verify.

The `datasets` library lists the files of a config and split, so that they match the dataset's page. They are read in
the order of the hashes of their names: repositories are sorted by topic or date, and most runs read only some files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from components.download import hubaccess
from components.download.hubaccess import HTTP_ERRORS, Repository, as_input, no_access, refused, retried_call, token
from components.download.localpaths import composed, shown
from components.download.readers import split_suffix
from components.download.writer import Input
from manifests.dataspec import HubSource
from trainer.errors import DataError

PATHS_ASKED = 500  # paths per request to the Hub


def resolve(source: HubSource) -> tuple[str, list[Input]]:
    """Returns (commit, files of the config and split at that commit, with size and checksum).

    Raises:
        DataError: dataset, revision, config or split does not exist, or access is refused.
        LaunchError: the Hub does not answer.
        VolumeError: a cache file of the libraries is not usable.
    """
    disable_progress_bars()
    api, name = HfApi(token=token()), source.dataset
    try:
        commit = current_commit(source)
        if source.files:
            infos = _chosen_files(source, commit)
        else:
            paths = [path.rpartition(f"@{commit}/")[2] for path in _split_files(source, commit)]
            infos = [
                info
                for some in _groups(paths, PATHS_ASKED)
                for info in retried_call(
                    name, partial(api.get_paths_info, name, some, revision=commit, repo_type="dataset")
                )
                if isinstance(info, RepoFile)
            ]
    except HTTP_ERRORS as error:
        raise refused(name, error, "dataset") from None
    inputs = []
    for info in sorted(infos, key=lambda info: hashlib.sha256(info.path.encode()).digest()):
        split_suffix(info.path)
        inputs.append(as_input(_repository(source), info))
    return commit, inputs


def current_commit(source: HubSource) -> str:
    """The current commit of the source's revision. Raises as `hubaccess.commit_of`."""
    return hubaccess.commit_of(_repository(source), source.revision)


def fetch(source: HubSource, commit: str, one: Input, folder: Path, advance: Callable[[int], None]) -> Path:
    """As `hubaccess.fetch`."""
    return hubaccess.fetch(_repository(source), commit, one, folder, advance)


def _repository(source: HubSource) -> Repository:
    return Repository(source.dataset, "dataset")


def _groups(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _chosen_files(source: HubSource, commit: str) -> list[RepoFile]:
    """The files of the repository that match the source's globs."""
    every = {one.path: one for one in hubaccess.files_of(_repository(source), commit)}
    wanted = {
        path
        for glob in source.files
        if not glob.startswith("!")
        for path in _matching(glob, every)
        if shown(path, glob)
    }
    unwanted = {path for glob in source.files if glob.startswith("!") for path in _matching(glob[1:], every)}
    chosen = [one for path, one in every.items() if path in wanted - unwanted]
    if not chosen:
        raise DataError(f"{source.dataset}: no file matches {', '.join(source.files)}; check origin.files")
    return chosen


def _matching(glob: str, paths: Iterable[str]) -> list[str]:
    """The path with this name, else the paths that match it, in any Unicode composition, as in files.py."""
    named = [path for path in paths if composed(path) == composed(glob)]
    return named or [path for path in paths if fnmatchcase(composed(path), composed(glob))]


def _split_files(source: HubSource, commit: str) -> list[str]:
    import datasets  # slow to import, and only sources on the Hub need it

    if os.path.exists(source.dataset):
        raise DataError(f"{source.dataset}: a folder of that name is here and would be used instead; run elsewhere")
    datasets.disable_progress_bars()
    try:
        builder = retried_call(
            source.dataset,
            lambda: datasets.load_dataset_builder(source.dataset, source.config, revision=commit, token=token()),
        )
    except (datasets.exceptions.DatasetsError, datasets.data_files.EmptyDatasetError) as error:
        if "gated" in str(error):  # the library keeps nothing else of the Hub's response
            raise no_access(source.dataset, "dataset") from None
        raise DataError(f"{source.dataset}: holds no data files that can be read; name files of it by URL") from None
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split("\n")[:2])
        if "config" in said.lower():
            raise DataError(f"{source.dataset}: {said}; set origin.config to one that exists") from None
        raise DataError(f"{source.dataset}: {said}; name files of it by URL instead") from None
    found = builder.config.data_files or {}
    if source.split not in found:
        raise DataError(
            f"{source.dataset}: no split '{source.split}'; splits are {', '.join(map(str, found)) or 'none'}"
        )
    return list(map(str, found[source.split]))
