"""Sources in buckets (S3, Google) and behind HTTP, read through fsspec from servers on this machine."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from bucket_server import BucketServer

from components.download import files
from components.download.step import run
from components.download.writer import Input
from manifests.spec import JobSpec
from trainer.data.manifest import DataError, read_manifest
from trainer.errors import VolumeError

TEXTS = [f"문서 {n} " + "text " * 40 for n in range(400)]
OBJECTS = {
    "a/0.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS[:200]).encode(),
    "a/1.jsonl.gz": gzip.compress(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS[200:]).encode()
    ),
    "b/2.jsonl": b'{"text": "not asked for"}\n',
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    with BucketServer(dict(OBJECTS)) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "STORAGE_EMULATOR_HOST": server.url,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
        for protocol in ("s3", "gcs"):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield server


ADDRESSES = pytest.mark.parametrize("address", ["s3://texts", "gs://texts"])


def source(address: str) -> dict:
    return {"kind": "files", "paths": [f"{address}/a/*"]}


def raw_texts(directory: str) -> list[str]:
    parts = sorted((Path(directory) / "web").glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_bytes().splitlines()]


@ADDRESSES
def test_a_bucket_is_read_once(
    bucket: BucketServer, address: str, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = make_job({"web": source(address)}, tmp_path)
    result = run(job)
    assert raw_texts(result.path) == TEXTS
    assert read_manifest(result.path).sources["web"].origin == f"files: {address}/a/*"
    bucket.objects.clear()
    scratch = Path(result.path) / "web" / ".fetch"
    scratch.mkdir()
    (scratch / "copy").write_bytes(b"of a run that was killed after its last part")
    assert run(job) == result and not scratch.exists()


@ADDRESSES
def test_ranges_are_asked_for_again_after_faults(
    bucket: BucketServer,
    address: str,
    make_job: Callable[..., JobSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    bucket.faults = {"a/0.jsonl": ["503", "reset"] if address.startswith("s3") else ["503"], "a/1.jsonl.gz": ["reset"]}
    assert raw_texts(run(make_job({"web": source(address)}, tmp_path)).path) == TEXTS


@pytest.fixture
def ends_at_fourth_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses the fourth range of 10,000 bytes, once."""
    real, calls = files.read_range, iter(range(100))

    def ends(*arguments: Any) -> bytes:
        if next(calls) == 3:
            raise PermissionError("the key was withdrawn")
        return real(*arguments)

    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(files, "read_range", ends)


@ADDRESSES
@pytest.mark.usefixtures("ends_at_fourth_range")
def test_what_a_failed_run_fetched_is_continued(
    bucket: BucketServer, address: str, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = make_job({"web": source(address)}, tmp_path)
    with pytest.raises(DataError, match=r"^source 'web': [^\n]*0.jsonl: cannot be fetched \(the key was withdrawn\)"):
        run(job)
    bucket.ranges.clear()
    assert raw_texts(run(job).path) == TEXTS
    first = next(wanted for key, wanted in bucket.ranges if key == "a/0.jsonl")
    assert first.startswith("bytes=30000-")


@pytest.mark.usefixtures("ends_at_fourth_range")
def test_a_web_server_with_ranges_is_continued_through_faults(
    bucket: BucketServer, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = make_job({"web": {"kind": "files", "paths": [f"{bucket.url}/texts/a/0.jsonl"]}}, tmp_path)
    bucket.faults = {"a/0.jsonl": ["503", "reset"]}
    with pytest.raises(DataError, match=r"^source 'web': http[^\n]*0.jsonl: cannot be fetched \(the key was withdrawn"):
        run(job)
    bucket.ranges.clear()
    assert raw_texts(run(job).path) == TEXTS[:200]
    assert bucket.ranges[0][1].startswith("bytes=") and bucket.ranges[0][1] > "bytes=0"


@ADDRESSES
@pytest.mark.usefixtures("ends_at_fourth_range")
def test_two_versions_of_an_object_are_never_put_together(
    bucket: BucketServer, address: str, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = make_job({"web": source(address)}, tmp_path)
    with pytest.raises(DataError):
        run(job)
    bucket.objects["a/0.jsonl"] = OBJECTS["a/0.jsonl"].replace("문서".encode(), "판본".encode())  # of the same size
    for protocol in ("s3", "gcs"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
    assert raw_texts(run(job).path) == [text.replace("문서", "판본") for text in TEXTS[:200]] + TEXTS[200:]


@ADDRESSES
def test_an_object_that_changes_after_it_was_listed_is_named(
    bucket: BucketServer,
    address: str,
    make_job: Callable[..., JobSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch = files.fetch

    def late(one: Input, *arguments: Any) -> Path:
        bucket.objects["a/1.jsonl.gz"] = gzip.compress(b'{"text": "another"}\n')
        for protocol in ("s3", "gcs"):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()
        return fetch(one, *arguments)

    monkeypatch.setattr(files, "fetch", late)
    with pytest.raises(DataError, match=r"^source 'web': [^\n]*1.jsonl.gz: changed since this download began[^\n]*$"):
        run(make_job({"web": source(address)}, tmp_path))
    assert len(list(tmp_path.rglob("part-*.jsonl"))) == 1


def web_job(bucket: BucketServer, make_job: Callable[..., JobSpec], tmp_path: Path) -> JobSpec:
    return make_job({"web": {"kind": "files", "paths": [f"{bucket.url}/texts/a/0.jsonl"]}}, tmp_path)


@pytest.mark.parametrize("stamps", [{"Last-Modified"}, set()])
@pytest.mark.usefixtures("ends_at_fourth_range")
def test_a_web_server_without_etags_never_gives_two_versions(
    bucket: BucketServer, make_job: Callable[..., JobSpec], tmp_path: Path, stamps: set[str]
) -> None:
    bucket.stamps = stamps
    job = web_job(bucket, make_job, tmp_path)
    with pytest.raises(DataError, match="the key was withdrawn"):
        run(job)
    bucket.replace("a/0.jsonl", OBJECTS["a/0.jsonl"].replace("문서".encode(), "판본".encode()))  # of the same size
    assert raw_texts(run(job).path) == [text.replace("문서", "판본") for text in TEXTS[:200]]


@pytest.mark.parametrize("stamps", [{"ETag"}, {"Last-Modified"}])
def test_a_file_that_changes_between_two_ranges_is_named_and_not_kept(
    bucket: BucketServer,
    make_job: Callable[..., JobSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stamps: set[str],
) -> None:
    real, calls = files.read_range, iter(range(100))

    def late(*arguments: Any) -> bytes:
        if next(calls) == 2:
            bucket.replace("a/0.jsonl", OBJECTS["a/0.jsonl"].replace("문서".encode(), "판본".encode()))
        return real(*arguments)

    bucket.stamps = stamps
    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(files, "read_range", late)
    with pytest.raises(DataError, match=r"^source 'web': [^\n]*0.jsonl: changed since this download began[^\n]*$"):
        run(web_job(bucket, make_job, tmp_path))
    assert not list(tmp_path.rglob("part-*")) and not list(tmp_path.rglob(".fetch/*"))


def test_a_copy_longer_than_the_file_is_fetched_again(
    bucket: BucketServer, make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.read_range

    def full(*arguments: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(files, "read_range", full)
    job = web_job(bucket, make_job, tmp_path)
    with pytest.raises(VolumeError, match="the volume is full; make room and run again"):
        run(job)
    (copy,) = tmp_path.rglob(".fetch/*")
    copy.write_bytes(OBJECTS["a/0.jsonl"] + b'{"text": "too much"}\n')
    monkeypatch.setattr(files, "read_range", real)
    assert raw_texts(run(job).path) == TEXTS[:200]


@ADDRESSES
def test_a_bucket_without_such_objects_is_one_line(
    bucket: BucketServer, address: str, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"^source 'web': {address}/none/x.jsonl: no such file; check the path[^\n]*$"):
        run(make_job({"web": {"kind": "files", "paths": [f"{address}/none/x.jsonl"]}}, tmp_path))


@ADDRESSES
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("c/a[1].jsonl", ["literal"]),
        ("c/a?.jsonl", ["question"]),
        ("c/a[12].jsonl", ["one"]),
        ("c/한글.jsonl", ["composed"]),
        ("c/한*.jsonl", ["composed"]),
        ("c/*[!?].jsonl", ["one", "literal", "composed"]),
    ],
)
def test_an_object_that_is_there_is_meant_literally(
    bucket: BucketServer,
    address: str,
    make_job: Callable[..., JobSpec],
    tmp_path: Path,
    asked: str,
    expected: list[str],
) -> None:
    names = {"a[1]": "literal", "a1": "one", "a?": "question", unicodedata.normalize("NFD", "한글"): "composed"}
    for name, text in names.items():
        bucket.replace(f"c/{name}.jsonl", f'{{"text": "{text}"}}\n'.encode())
    job = make_job({"web": {"kind": "files", "paths": [f"{address}/{asked}"]}}, tmp_path)
    assert raw_texts(run(job).path) == expected
