"""Access to repositories on the Hugging Face Hub: commits, files and their checksums, resumable downloads.

Files are downloaded over plain HTTP into a partial file, which a later run continues; a complete file is compared with
the Hub's checksum. The access token is read only from the environment variable HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast

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

from components.download.retry import retried, status_of
from components.download.writer import Input
from trainer.errors import DataError, ForeseenError, LaunchError, in_words, of_the_machine

ATTEMPTS = 6
RETRY_SECONDS, MAX_WAIT_SECONDS = 2.0, 60.0
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# The base of the HTTP client's errors, which differs between versions of huggingface_hub.
HTTP_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
T = TypeVar("T")


class Repository(NamedTuple):
    name: str
    kind: Literal["dataset", "model"]


def commit_of(repository: Repository, revision: str) -> str:
    """The current commit of a revision.

    Raises:
        DataError: no such repository or revision (also a deleted one), or access is refused.
        LaunchError: the Hub does not answer.
    """
    name, kind = repository
    disable_progress_bars()
    try:
        commit = retried_call(name, lambda: HfApi(token=token()).repo_info(name, revision=revision, repo_type=kind).sha)
    except HFValidationError:
        raise DataError(f"{name}: not a {kind} name; write owner/name") from None
    except RevisionNotFoundError:
        raise DataError(f"{name}: has no revision '{revision}'; give a branch, tag or commit of it") from None
    except HTTP_ERRORS as error:
        raise refused(name, error, kind) from None
    assert commit is not None
    if re.fullmatch(r"[0-9a-f]{40}", revision) and commit != revision:
        raise DataError(f"{name}: revision {revision} moved to {commit}; pin that commit, or another that exists")
    return commit


def files_of(repository: Repository, commit: str) -> list[RepoFile]:
    """All files at a commit."""
    name, kind = repository
    listing = retried_call(
        name,
        lambda: list(HfApi(token=token()).list_repo_tree(name, recursive=True, revision=commit, repo_type=kind)),
    )
    return [one for one in listing if isinstance(one, RepoFile)]


def as_input(repository: Repository, file: RepoFile) -> Input:
    """A file with its size and the Hub's checksum."""
    proof = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
    return Input(name=f"{repository.name}/{file.path}", location=file.path, bytes=file.size, checksum=proof)


def fetch(repository: Repository, commit: str, one: Input, folder: Path, advance: Callable[[int], None]) -> Path:
    """Download a file to `folder` and verify its checksum; continues the partial file of an earlier call.

    Raises:
        DataError: it no longer exists, or its content does not match the Hub's checksum.
        LaunchError: the Hub does not answer.
        OSError: it cannot be written.
    """
    disable_progress_bars()
    name, kind = repository
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / hashlib.sha256(f"{commit}/{one.location}".encode()).hexdigest()[:16]
    url = hf_hub_url(name, one.location, repo_type=kind, revision=commit)
    headers = build_hf_headers(token=token())
    for _ in range(2):  # the partial file of an earlier run may be damaged: start over once
        try:
            retried_call(one.name, lambda: _continue(url, headers, target, one.bytes, advance))
        except HTTP_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise
            if status_of(error) == 404:
                fix = "set origin.revision to" if kind == "dataset" else "name (owner/name@revision)"
                raise DataError(
                    f"{one.name}: no longer on the Hub at commit {commit}, with which this download started; {fix} "
                    "one that exists, finished work is kept"
                ) from None
            raise refused(one.name, error, kind) from None
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
    """A file that reports its writes, because http_get can only draw its own progress bar or print nothing."""

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


def retried_call(what: str, call: Callable[[], T]) -> T:
    return retried(what, call, _is_transient, ATTEMPTS, RETRY_SECONDS, MAX_WAIT_SECONDS)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        # A size mismatch after a cut connection is an OSError without errno; a full disk has one.
        return error.errno is None and not isinstance(error, FileNotFoundError)
    return isinstance(error, HTTP_ERRORS)


def token() -> str | bool:
    # A secret made from a file ends in a newline. It is invalid in a header, and the error would print the token.
    return os.environ.get("HF_TOKEN", "").strip() or False


def refused(name: str, error: Exception, kind: str) -> ForeseenError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError) or status == 403:
        return no_access(name, kind)
    if isinstance(error, RepositoryNotFoundError):
        return DataError(f"{name}: no such {kind} on the Hub, or a private one; check the name, or set HF_TOKEN")
    if status is not None and status not in TRANSIENT_STATUS:
        return DataError(f"{name}: the Hub refused the request ({in_words(error)}); check the name and revision")
    if (of_this_machine := of_the_machine(error)) is not None:
        return of_this_machine
    return LaunchError(f"{name}: the Hub cannot be read ({in_words(error)}); check the network and try again")


def no_access(name: str, kind: str) -> DataError:
    return DataError(f"{name}: access refused; accept the {kind}'s terms on its page on the Hub and set HF_TOKEN")
