"""Sources on the Hugging Face Hub: resolve a dataset to a commit and its files, download with resume, verify.

The `datasets` library says which files a config and split have, so that they match the dataset's page. They are read in
the order of their names' hashes: repositories are sorted by topic or date, and most runs read only a part of them. The
bytes come over plain HTTP into a partial file that a later run continues; a complete file is compared with the Hub's
checksum. The access token comes only from the environment variable HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

from components.download.localpaths import composed, shown
from components.download.readers import split_suffix
from components.download.retry import retried, status_of
from components.download.writer import Input
from manifests.dataspec import HubSource
from trainer.errors import DataError, ForeseenError, LaunchError, in_words, of_the_machine

ATTEMPTS = 6
PATHS_ASKED = 500  # paths per request to the Hub
RETRY_SECONDS, MAX_WAIT_SECONDS = 2.0, 60.0
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# The base of the HTTP client's errors, which differs between versions of huggingface_hub.
HTTP_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
T = TypeVar("T")


def resolve(source: HubSource) -> tuple[str, list[Input]]:
    """Returns (commit, files of the config and split at that commit, with size and checksum).

    Raises:
        DataError: dataset, revision, config or split does not exist, or access is refused.
        LaunchError: the Hub does not answer.
        VolumeError: a cache file of the libraries is not usable.
    """
    disable_progress_bars()
    api, name = HfApi(token=_token()), source.dataset
    try:
        commit = current_commit(source)
        if source.files:
            infos = _chosen_files(api, source, commit)
        else:
            paths = [path.rpartition(f"@{commit}/")[2] for path in _split_files(source, commit)]
            infos = [
                info
                for some in _groups(paths, PATHS_ASKED)
                for info in _retried(
                    name, partial(api.get_paths_info, name, some, revision=commit, repo_type="dataset")
                )
                if isinstance(info, RepoFile)
            ]
    except HTTP_ERRORS as error:
        raise _refused(name, error) from None
    inputs = []
    for info in sorted(infos, key=lambda info: hashlib.sha256(info.path.encode()).digest()):
        split_suffix(info.path)
        proof = f"sha256:{info.lfs.sha256}" if info.lfs else f"git:{info.blob_id}"
        inputs.append(Input(name=f"{name}/{info.path}", location=info.path, bytes=info.size, checksum=proof))
    return commit, inputs


def current_commit(source: HubSource) -> str:
    """The current commit of the source's revision.

    Raises:
        DataError: as `resolve`; a deleted revision counts as one that does not exist.
    """
    name = source.dataset
    try:
        commit = _retried(name, lambda: HfApi(token=_token()).dataset_info(name, revision=source.revision).sha)
    except HFValidationError:
        raise DataError(f"{name}: not a dataset name; write owner/name") from None
    except RevisionNotFoundError:
        raise DataError(f"{name}: has no revision '{source.revision}'; give a branch, tag or commit of it") from None
    except HTTP_ERRORS as error:
        raise _refused(name, error) from None
    assert commit is not None
    if re.fullmatch(r"[0-9a-f]{40}", source.revision) and commit != source.revision:
        raise DataError(f"{name}: revision {source.revision} moved to {commit}; pin that one, or another that exists")
    return commit


def fetch(dataset: str, commit: str, one: Input, folder: Path, advance: Callable[[int], None]) -> Path:
    """Download a file to `folder` and verify its checksum; continues the partial file of an earlier call.

    Raises:
        DataError: it no longer exists, or its content does not match the Hub's checksum.
        LaunchError: the Hub does not answer.
        OSError: it cannot be written.
    """
    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / hashlib.sha256(f"{commit}/{one.location}".encode()).hexdigest()[:16]
    url = hf_hub_url(dataset, one.location, repo_type="dataset", revision=commit)
    headers = build_hf_headers(token=_token())
    for _ in range(2):  # the partial file of an earlier run may be damaged: start over once
        try:
            _retried(one.name, lambda: _continue(url, headers, target, one.bytes, advance))
        except HTTP_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise
            if status_of(error) == 404:
                raise DataError(
                    f"{one.name}: not on the Hub any more at commit {commit}, which this download began with; set "
                    "origin.revision to one that exists, finished work is kept"
                ) from None
            raise _refused(one.name, error) from None
        if target.stat().st_size == one.bytes and _proof(target, one.checksum or "") == one.checksum:
            return target
        target.unlink()
    raise DataError(f"{one.name}: differed from the Hub's checksum, twice; try later or report it to the Hub")


def _continue(url: str, headers: dict[str, str], target: Path, size: int, advance: Callable[[int], None]) -> None:
    with open(target, "ab") as file:
        if file.tell() > size:
            file.seek(0)
            file.truncate()
        told = cast(BinaryIO, _Told(file, advance))
        http_get(url, told, resume_size=file.tell(), headers=headers, expected_size=size)
        file.flush()
        os.fsync(file.fileno())


class _Told:
    """A file that reports its writes, because http_get only draws its own bars or is silent."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def write(self, data: bytes) -> int:
        self._advance(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _proof(path: Path, like: str) -> str:
    if like.startswith("git:"):
        state = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return f"{like.partition(':')[0]}:{state.hexdigest()}"


def _groups(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _chosen_files(api: HfApi, source: HubSource, commit: str) -> list[RepoFile]:
    """The files of the repository that match the source's globs."""
    listing = _retried(
        source.dataset,
        lambda: list(api.list_repo_tree(source.dataset, recursive=True, revision=commit, repo_type="dataset")),
    )
    every = {one.path: one for one in listing if isinstance(one, RepoFile)}
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
        builder = _retried(
            source.dataset,
            lambda: datasets.load_dataset_builder(source.dataset, source.config, revision=commit, token=_token()),
        )
    except (datasets.exceptions.DatasetsError, datasets.data_files.EmptyDatasetError) as error:
        if "gated" in str(error):  # the library keeps nothing else of the Hub's response
            raise _no_access(source.dataset) from None
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


def _retried(what: str, call: Callable[[], T]) -> T:
    return retried(what, call, _is_transient, ATTEMPTS, RETRY_SECONDS, MAX_WAIT_SECONDS)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        # A size mismatch after a cut connection is an OSError without errno; a full disk has one.
        return error.errno is None and not isinstance(error, FileNotFoundError)
    return isinstance(error, HTTP_ERRORS)


def _token() -> str | bool:
    # Secrets made from files end in a newline, which is invalid in a header; the error would print the token.
    return os.environ.get("HF_TOKEN", "").strip() or False


def _refused(name: str, error: Exception) -> ForeseenError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError) or status == 403:
        return _no_access(name)
    if isinstance(error, RepositoryNotFoundError):
        return DataError(f"{name}: no such dataset on the Hub, or a private one; check the name, or set HF_TOKEN")
    if status is not None and status not in TRANSIENT_STATUS:
        return DataError(f"{name}: the Hub refuses it ({in_words(error)}); check its name and revision")
    if (of_this_machine := of_the_machine(error)) is not None:
        return of_this_machine
    return LaunchError(f"{name}: the Hub cannot be read ({in_words(error)}); check the network and try again")


def _no_access(name: str) -> DataError:
    return DataError(f"{name}: access refused; accept the dataset's terms on its page on the Hub and set HF_TOKEN")
