"""Sources that are files: paths, globs and URLs through fsspec, and `sample://NAME`, the corpus shipped with yaongi."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback
from fsspec.utils import glob_translate

from components.download.localpaths import composed, find_local, shown
from components.download.readers import split_suffix
from components.download.retry import retried, status_of
from components.download.writer import Input
from manifests.dataspec import FilesSource
from trainer.errors import FULL, DataError, ForeseenError, LaunchError, VolumeError, in_words
from trainer.files import checksum

SAMPLE = "sample://"
ATTEMPTS = 5
RETRY_SECONDS = 1.0
RANGE_BYTES = 16 * 2**20
GLOBS = "globs such as texts/*.jsonl.gz are allowed"
T = TypeVar("T")


def list_inputs(source: FilesSource, known: list[Input], folder: str | None = None) -> list[Input]:
    """The files of a source in a fixed order, local ones with their checksums.

    `known` are the inputs of an earlier run: a file with the same stamp is not hashed again. Relative paths start in
    `folder`, by default the working directory.

    Raises:
        DataError: a pattern matches nothing, a path is a folder, a suffix is unknown, or an address refuses.
        LaunchError: an address does not answer.
        VolumeError: a local file cannot be read.
    """
    inputs: dict[str, Input] = {}  # by location: a path and a glob may name the same file, which must be read once
    before = {one.name: one for one in known}
    for pattern in source.paths:
        for item in _matches(pattern, folder):
            if item.location not in inputs:
                split_suffix(item.name)
                inputs[item.location] = _identified(item, before.get(item.name))
    return list(inputs.values())


def revision(inputs: list[Input]) -> str:
    """A digest of the contents (not the paths) of local files, and of the addresses and sizes of remote ones."""
    text = "\n".join(identity(one) for one in inputs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(one: Input) -> str:
    """Identifies the file's content as far as possible before it is read."""
    return one.checksum or f"{one.name} {one.bytes} {one.stamp or ''}".rstrip()


def is_local(one: Input) -> bool:
    return "://" not in one.location


def fetch(one: Input, folder: Path, advance: Callable[[int], None]) -> Path:
    """Copy a remote file to `folder`; continues the partial copy of an earlier call if the server supports ranges.

    `advance` receives the number of new bytes.

    Raises:
        DataError: the address refuses, or has another version than was listed.
        LaunchError: it does not answer, even after retries.
        OSError: the copy cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / hashlib.sha256(f"{one.location} {one.stamp}".encode()).hexdigest()[:16]
    try:
        system, path = fsspec.core.url_to_fs(one.location)
        _check_unchanged(system, path, one)
        if one.stamp is None:
            copy.unlink(missing_ok=True)  # nothing shows that it is of the same version
        if not one.bytes or not _get_ranges(system, path, copy, one.bytes, advance):
            _retried(one.name, lambda: _get_whole(system, path, copy, one.bytes, advance))
        try:
            _check_unchanged(system, path, one)
        except DataError:
            copy.unlink()  # it mixes two versions
            raise
    except ForeseenError:
        raise
    except Exception as error:  # each protocol of fsspec has errors of its own
        if _of_the_volume(error, folder):
            raise
        raise _unanswered(one.name, "cannot be fetched", error) from None
    return copy


def check_local(one: Input) -> None:
    """Refuse a local file whose content changed after it was listed.

    Raises:
        DataError: it changed.
        VolumeError: it cannot be read.
    """
    if _identified(one, one).checksum != one.checksum:
        raise _changed(one)


def _changed(one: Input) -> DataError:
    return DataError(f"{one.name}: changed since this download began; inputs must not change, copy it")


def _check_unchanged(system: AbstractFileSystem, path: str, one: Input) -> None:
    system.invalidate_cache()
    info = _retried(one.name, lambda: _info(system, path))
    if (info["size"] or 0, _stamp(info)) != (one.bytes, one.stamp):
        raise _changed(one)


def _get_ranges(system: AbstractFileSystem, path: str, copy: Path, size: int, advance: Callable[[int], None]) -> bool:
    """Append what `copy` lacks, range by range; False if the server does not support ranges."""
    with open(copy, "ab") as file:
        if file.tell() > size:
            file.seek(0)
            file.truncate()
        while (start := file.tell()) < size:
            try:
                data = _retried(path, partial(read_range, system, path, size, start, min(start + RANGE_BYTES, size)))
            except ValueError:
                return False
            file.write(data)
            file.flush()
            advance(len(data))
        os.fsync(file.fileno())
    return True


def read_range(system: AbstractFileSystem, path: str, size: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a remote file of `size` bytes.

    Raises:
        ValueError: the server ignores ranges.
        OSError: the response is not the requested range.
    """
    with system.open(path, "rb", cache_type="none", **({"size": size} if path.startswith("http") else {})) as file:
        if not file.seekable():
            raise ValueError("a stream")
        file.seek(start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise OSError(f"{len(data)} of {stop - start} bytes came")
    return data


def _get_whole(system: AbstractFileSystem, path: str, copy: Path, size: int, advance: Callable[[int], None]) -> None:
    class Report(Callback):
        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    system.get_file(path, str(copy), callback=Report())
    if size and copy.stat().st_size != size:
        raise OSError(f"{copy.stat().st_size} of {size} bytes came")


def _stamp(info: dict[str, Any]) -> str | None:
    """The server's identifier of this file version, if it sends one."""
    found = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("Last-Modified")
    return str(found).strip('"') if found else None


def _retried(what: str, call: Callable[[], T]) -> T:
    return retried(what, call, _is_transient, ATTEMPTS, RETRY_SECONDS, 30.0)


def _is_transient(error: BaseException) -> bool:
    final = ForeseenError | FileNotFoundError | PermissionError | NotImplementedError | ValueError | ImportError
    if isinstance(error, final) or _is_full(error) or _is_refusal(error):
        return False
    status = status_of(error)
    return isinstance(error, Exception) and (status is None or status in (408, 429) or status >= 500)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def _of_the_volume(error: Exception, folder: Path) -> bool:
    """Whether writing to `folder` failed; server errors are OSErrors too, but name no file in it."""
    named = getattr(error, "filename", None)
    return _is_full(error) or (isinstance(named, str | Path) and Path(named).is_relative_to(folder))


def _matches(pattern: str, folder: str | None) -> list[Input]:
    if pattern.startswith(SAMPLE):
        path = Path(str(files("components") / "download" / "sample" / pattern.removeprefix(SAMPLE)))
        if not path.is_file():
            names = ", ".join(sorted(SAMPLE + p.name for p in path.parent.glob("*.jsonl.gz")))
            raise DataError(f"{pattern}: no such sample; there are {names}")
        return [Input(name=pattern, location=str(path), bytes=path.stat().st_size)]
    if "://" not in pattern or pattern.startswith("file://"):
        return _local_matches(pattern, folder)
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        paths, named = _remote_paths(system, path)
        infos = [(one, _retried(one, partial(_info, system, one))) for one in paths]
    except FileNotFoundError:
        infos = []
    except ImportError as error:
        extra = pattern.startswith(("s3://", "gs://", "gcs://"))
        remedy = "they are in the extra buckets, which make setup has" if extra else "or copy the files to S3 or a disk"
        raise DataError(f"{pattern}: {in_words(error)}; {remedy}") from None
    except Exception as error:  # each protocol of fsspec has errors of its own
        raise _unanswered(pattern, "cannot be listed", error) from None
    if not infos:
        raise DataError(f"{pattern}: no such file; check the path ({GLOBS})")
    _check_files(pattern, [info["type"] == "directory" for _, info in infos])
    found = []
    for one, info in infos:
        location = system.unstrip_protocol(one)
        name = pattern if named else location
        if info["type"] != "directory":
            found.append(Input(name=name, location=location, bytes=info["size"] or 0, stamp=_stamp(info)))
    return found


def _local_matches(pattern: str, folder: str | None) -> list[Input]:
    plain = pattern.removeprefix("file://")
    paths, named, wanted = find_local(plain, folder)
    if (
        not paths and folder is not None and find_local(plain, None)[0]
    ):  # earlier versions resolved relative paths here, not at the job file
        paths, named, _ = find_local(plain, None)
        print(f"download: {pattern}: {wanted} is not there; taken from {os.getcwd()}", flush=True)
    if not paths:
        hint = f"folders are separated by /: {plain.replace(chr(92), '/')}" if "\\" in plain else GLOBS
        raise DataError(f"{pattern}: no such file; check the path, {wanted} was tried ({hint})")
    _check_files(pattern, list(map(os.path.isdir, paths)))
    found = []
    for path in paths:
        if not os.path.isdir(path):
            # A single path keeps the name the user gave, so that moving the working directory changes nothing.
            item = Input(name=pattern if named else path, location=path, bytes=0)
            found.append(item.model_copy(update={"bytes": _status(item).st_size}))
    return found


def _check_files(pattern: str, are_folders: list[bool]) -> None:
    if all(are_folders):
        what = "a folder; name the files in it" if len(are_folders) == 1 else "only folders; name the files in them"
        raise DataError(f"{pattern}: {what}, such as {pattern.rstrip('/')}/*.jsonl.gz")


def _remote_paths(system: AbstractFileSystem, path: str) -> tuple[list[str], bool]:
    """The matching paths, and whether it is one path that was named itself; like `find_local` for local ones."""
    web = path.startswith("http")
    pattern = re.search(r"[*[]" if web else r"[*?[]", path)  # in a URL, ? begins the query
    for spelt in dict.fromkeys((path, composed(path), unicodedata.normalize("NFD", path))):
        try:
            _retried(spelt, partial(_info, system, spelt))
        except FileNotFoundError:
            continue
        except Exception:  # servers may reject a pattern as an address; listing reports what is wrong
            if not pattern:
                raise
            break
        return [spelt], True
    if not pattern:
        return [], False
    if web:
        return sorted(one for one in _retried(path, lambda: system.glob(path)) if shown(one, path)), False
    root = path[: path.rfind("/", 0, pattern.start()) + 1]
    depth = None if "**" in path else path.count("/", len(root)) + 1
    match = re.compile(glob_translate(composed(path))).match
    every = _retried(path, lambda: system.find(root, maxdepth=depth, withdirs=True))
    return sorted(one for one in every if match(composed(one)) and shown(one, path)), False


def _info(system: AbstractFileSystem, path: str) -> dict[str, Any]:
    """The metadata of a file from its file system.

    For a URL, fsspec reports "not found" for every failed request. Here only a missing file is "not found", so
    that a busy server is retried and a refusal is reported as such.
    """
    try:
        return system.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if path.startswith("http") and isinstance(cause, Exception) and status_of(cause) not in (404, 410):
            raise cause from None
        raise


def _identified(item: Input, known: Input | None) -> Input:
    if not is_local(item):
        return item
    status = _status(item)
    stamp = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    same = known is not None and known.stamp == stamp and known.location == item.location
    content = known.checksum if known is not None and same else None
    try:
        content = content or checksum(item.location, "sha256")
    except OSError as error:
        raise _unreadable(item, error) from None
    return item.model_copy(update={"checksum": content, "stamp": stamp})


def _status(item: Input) -> os.stat_result:
    try:
        status = Path(item.location).stat()
    except OSError as error:
        if os.path.islink(item.location):
            target = os.readlink(item.location)
            raise DataError(f"{item.name}: a link to {target} ({error.strerror}); fix or remove it") from None
        raise _unreadable(item, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{item.name}: not a regular file, so it cannot be read twice; copy its content to one")
    return status


def _unreadable(item: Input, error: OSError) -> VolumeError:
    return VolumeError(f"{item.name}: cannot be read ({error.strerror}); check its permissions")


def _is_refusal(error: BaseException) -> bool:
    no_credentials = type(error).__name__.endswith("CredentialsError")  # from the S3 and Google libraries
    return no_credentials or isinstance(error, PermissionError) or status_of(error) in (401, 403)


def _unanswered(name: str, what: str, error: Exception) -> ForeseenError:
    """A DataError if the server refuses, a LaunchError if it does not answer."""
    remedy = "check the address and the network"
    if _is_refusal(error):
        remedy = "check its permissions and the credentials in the environment"
    return (LaunchError if _is_transient(error) else DataError)(f"{name}: {what} ({in_words(error)}); {remedy}")
