"""Sources that cannot be used or change during the download: messages are correct, and nothing is read twice."""

from __future__ import annotations

import errno
import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.download import files, scores, source
from components.download.step import run
from components.volume import volume_explained
from manifests.spec import JobSpec
from trainer.errors import ForeseenError, VolumeError
from trainer.exitcodes import ExitCode

LINES = b'{"text": "One."}\n{"text": "Two."}\n'


def from_files(*paths: Path | str) -> dict:
    return {"kind": "files", "paths": [str(path) for path in paths]}


def raw_texts(directory: str) -> list[str]:
    parts = sorted((Path(directory) / "web").glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_bytes().splitlines()]


def refused(job: JobSpec, code: int = ExitCode.DATA) -> str:
    with pytest.raises(ForeseenError) as caught:
        run(job)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    assert caught.value.code == code
    return str(caught.value)


class Answers:
    """A web server that answers with these statuses in turn and then always with the last; 200 returns LINES."""

    def __init__(self) -> None:
        self.statuses: list[int] = [200]
        self.asked = 0
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status = answers.statuses[min(answers.asked, len(answers.statuses) - 1)]
                answers.asked += 1
                body = LINES if status == 200 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/a.jsonl"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    answers = Answers()
    with answers.server:
        threading.Thread(target=answers.server.serve_forever, daemon=True).start()
        yield answers
        answers.server.shutdown()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_web_server_that_is_busy_when_listed_is_asked_again(
    web: Answers, make_job: Callable[..., JobSpec], tmp_path: Path, status: int
) -> None:
    web.statuses = [status] * 4 + [200]
    assert raw_texts(run(make_job({"web": from_files(web.address)}, tmp_path)).path) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "check its permissions and the credentials in the environment"),
        (403, "check its permissions and the credentials in the environment"),
        (404, "no such file; check the path"),
        (410, "no such file; check the path"),
        (500, "cannot be listed (500, message='Internal Server Error'"),
    ],
)
def test_a_web_server_that_refuses_is_called_so(
    web: Answers, make_job: Callable[..., JobSpec], tmp_path: Path, status: int, said: str
) -> None:
    web.statuses = [status]
    code = ExitCode.UNAVAILABLE if status == 500 else ExitCode.DATA
    assert said in refused(make_job({"web": from_files(web.address)}, tmp_path), code)
    assert web.asked == (2 * files.ATTEMPTS if status == 500 else 2), "HEAD and GET, again only where that may help"


def test_a_web_server_that_is_not_there_is_not_a_missing_file(
    web: Answers, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    web.server.shutdown()
    web.server.server_close()
    message = refused(make_job({"web": from_files(web.address)}, tmp_path), ExitCode.UNAVAILABLE)
    assert "cannot be listed (Cannot connect to host" in message
    assert message.endswith("check the address and the network")


def test_a_bucket_without_credentials_says_so_at_once(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    tries = list[object]()
    monkeypatch.setattr("components.download.retry.add", lambda _: tries.append(None))
    message = refused(make_job({"web": from_files("s3://texts/a.jsonl")}, tmp_path))
    assert "Unable to locate credentials" in message and "the credentials in the environment" in message
    assert not tries
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_protocol_without_its_library_names_what_is_missing(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    message = refused(make_job({"web": from_files("abfs://texts/a.jsonl")}, tmp_path))
    assert "adlfs" in message and "s3fs" not in message and "extra buckets" not in message


def test_a_file_that_several_patterns_name_is_read_once(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "Zero."}\n')
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("b.jsonl", tmp_path / "*.jsonl", tmp_path / "b.jsonl", "./b.jsonl", tmp_path / "x" / ".." / "b.jsonl")
    result = run(make_job({"web": from_files(*names)}, tmp_path / "data"))
    assert raw_texts(result.path) == ["One.", "Two.", "Zero."]


def test_folders_alone_are_said_to_be_folders(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
    message = refused(make_job({"web": from_files(tmp_path / "texts" / "*")}, tmp_path / "data"))
    assert message.endswith(
        "texts/*: only folders; name the files in them, such as " + f"{tmp_path}/texts/*/*.jsonl.gz"
    )


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst", "b.txt.gz"])
def test_a_compressed_file_of_no_bytes_is_damaged(make_job: Callable[..., JobSpec], tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / name).write_bytes(b"")
    message = refused(make_job({"web": from_files(tmp_path / "a.jsonl.gz", tmp_path / name)}, tmp_path / "data"))
    assert f"{name}: damaged or cut-off {'zstd' if name.endswith('zst') else 'gzip'} (0 bytes)" in message


def test_a_text_of_a_parquet_file_that_is_not_utf_8_is_named(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    offsets = pa.array([0, 4, 6], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"good\xff\xfe")])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    message = refused(make_job({"web": from_files(tmp_path / "a.parquet")}, tmp_path / "data"))
    assert "a.parquet rows 1 to 2: a text is not UTF-8" in message


def test_a_local_file_that_grows_while_it_is_read_is_named_and_not_kept(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    job = make_job({"web": from_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl")}, tmp_path / "data")
    real = scores.rows

    def growing(path: Path, *others: object) -> Iterator[object]:
        if path.name == "b.jsonl":
            with open(path, "ab") as file:
                file.write(b'{"text": "Three."}\n')
        yield from real(path, *others)

    with monkeypatch.context() as patched:
        patched.setattr(scores, "rows", growing)
        assert "b.jsonl: changed since this download began; inputs must not change" in refused(job)
    result = run(job)
    assert raw_texts(result.path) == ["One.", "Two.", "One.", "Two.", "Three."]


def test_a_local_file_that_is_only_touched_while_it_is_read_is_taken(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    real = scores.rows

    def touching(path: Path, *others: object) -> Iterator[object]:
        os.utime(path, ns=(1, 1))
        yield from real(path, *others)

    monkeypatch.setattr(scores, "rows", touching)
    result = run(make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data"))
    assert raw_texts(result.path) == ["One.", "Two."]


def test_a_quota_that_is_used_up_is_a_full_volume(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.raises(VolumeError, match="the volume is full; make room"), volume_explained(tmp_path):
        over()
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr(source, "write_part", over)
    job = make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "d")
    assert refused(job, ExitCode.VOLUME) == (
        f"source 'web': {job.stage_dir('raw')}/web: the volume is full; make room and run again, finished work is kept"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_copy_that_cannot_be_written_is_the_volumes_fault_not_the_servers(
    web: Answers, make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuses(_system: object, _path: str, copy: Path, *_: object) -> bool:
        raise OSError(number, os.strerror(number), str(copy))

    web.statuses = [200]
    monkeypatch.setattr(files, "_get_ranges", refuses)
    job = make_job({"web": from_files(web.address)}, tmp_path)
    assert job.stage_dir("raw") in refused(job, ExitCode.VOLUME)
