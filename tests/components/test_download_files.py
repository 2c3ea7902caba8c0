"""Sources that are files: formats, reruns, changes, kills and every input that cannot be used."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.download import files, source
from components.download.step import run
from manifests.spec import JobSpec, load_job
from trainer.data.manifest import DataError, read_manifest, verify
from trainer.errors import LaunchError, VolumeError

TEXTS = ["첫째 문서입니다.\n두 줄입니다.", "Second \U0001f600 document", 'Quotes " and \\ stay']


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def parquet(texts: list[str | None], path: Path, column: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)


def from_files(*paths: Path | str) -> dict:
    return {"kind": "files", "paths": [str(path) for path in paths]}


def raw_texts(directory: Path, name: str) -> list[str]:
    parts = sorted((directory / name).glob("part-*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_bytes().splitlines()]
    assert all(list(row) == ["text"] for row in rows)
    return [row["text"] for row in rows]


def state(directory: Path) -> dict[str, tuple[int, int]]:
    found = {str(p.relative_to(directory)): p.stat() for p in directory.rglob("*") if p.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz", "a.jsonl.zst", "a.parquet"])
def test_each_format_gives_the_same_texts(name: str, make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet([TEXTS[0], "", None, *TEXTS[1:]], path)
    else:
        pack = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
        path.write_bytes(pack(json_lines([TEXTS[0], " \n", *TEXTS[1:]])))
    result = run(make_job({"web": from_files(path)}, tmp_path / "data"))
    assert raw_texts(Path(result.path), "web") == TEXTS
    manifest = read_manifest(result.path, "raw")
    verify(result.path, manifest)
    assert result.digest == manifest.digest
    counts = manifest.counts("web")
    assert (counts.documents, counts.text_bytes) == (3, sum(len(text.encode()) for text in TEXTS))
    assert manifest.sources["web"].licence == "CC0-1.0"


def test_plain_text_files_are_documents_and_share_a_part(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"Packed."))
    result = run(make_job({"web": from_files(tmp_path / "*.txt", tmp_path / "*.txt.gz")}, tmp_path / "data"))
    assert raw_texts(Path(result.path), "web") == [*TEXTS, "Packed."]
    assert len(list(Path(result.path).rglob("part-*"))) == 1


def test_lone_surrogates_become_replacement_characters(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    result = run(make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data"))
    assert raw_texts(Path(result.path), "web") == ["a\ufffdb \U0001f600"]


def test_the_sample_corpus_is_real_and_its_rerun_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load_job("tiny", {"storage": {"datasets_dir": str(tmp_path)}})
    result = run(job)
    folder = Path(str(files.files("components"))) / "download" / "sample"
    for name in ("ko", "en", "code", "math"):
        packed = (folder / f"{name}.jsonl.gz").read_bytes()
        rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
        assert raw_texts(Path(result.path), name) == [row["text"] for row in rows]
        assert all(200 <= len(row["text"]) <= 20_000 and row["licence"] and row["source"] for row in rows)
        texts = [row["text"] for row in rows]
        assert len(set(texts)) == len(texts)
    assert int(result.summary["text_bytes"]) > 6_000_000
    korean = "".join(raw_texts(Path(result.path), "ko"))
    assert len(re.findall("[가-힣]", korean)) > 0.5 * len(re.findall(r"[^\W\d_]", korean))

    before = state(Path(result.path))
    capsys.readouterr()
    assert run(job) == result
    assert state(Path(result.path)) == before
    assert capsys.readouterr().out.startswith("download: unchanged and verified, nothing to do: ")


def test_only_a_source_whose_content_changed_is_read_again(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["two"]))
    job = make_job({"a": from_files(tmp_path / "a.jsonl"), "b": from_files(tmp_path / "b.jsonl")}, tmp_path / "data")
    first = run(job)
    before = state(Path(first.path))

    os.utime(tmp_path / "a.jsonl", (1, 1))  # touched, not changed
    assert run(job) == first
    after = state(Path(first.path))
    assert {name for name in after if after[name] != before[name]} == {"a/journal.json"}

    (tmp_path / "b.jsonl").write_bytes(json_lines(["TWO"]))  # same size
    second = run(job)
    assert second.digest != first.digest
    assert raw_texts(Path(second.path), "b") == ["TWO"]
    assert state(Path(second.path))["a/part-00000.jsonl"] == before["a/part-00000.jsonl"]


def test_a_file_that_leaves_the_glob_leaves_the_data(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(json_lines([f"text {i}"]))
    job = make_job({"web": from_files(tmp_path / "*.jsonl")}, tmp_path / "data")
    run(job)
    (tmp_path / "1.jsonl").unlink()
    result = run(job)
    assert raw_texts(Path(result.path), "web") == ["text 0", "text 2"]
    assert read_manifest(result.path).counts().documents == 2


def test_a_damaged_part_is_made_again(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    job = make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data")
    result = run(job)
    part = Path(result.path) / "web" / "part-00000.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole.replace(b"Second", b"sECOND"))
    assert run(job) == result
    assert part.read_bytes() == whole


def test_stops_at_the_byte_budget(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(json_lines(["x" * 100] * 10))
    result = run(make_job({"web": from_files(tmp_path / "*.jsonl")}, tmp_path / "data", 1450))
    assert result.summary["text_bytes"] == 1500
    assert run(make_job({"web": from_files(tmp_path / "*.jsonl")}, tmp_path / "data", 1450)) == result


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_urls_are_fetched_once(web: tuple[str, Path], make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    address, folder = web
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    job = make_job({"web": from_files(f"{address}/a.jsonl.gz?download=1")}, tmp_path / "data")
    result = run(job)
    assert raw_texts(Path(result.path), "web") == TEXTS
    assert not list(Path(result.path).rglob(".fetch"))
    (folder / "a.jsonl.gz").unlink()
    assert run(job) == result


def test_a_server_that_falters_is_asked_again(
    web: tuple[str, Path], make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = web
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS))
    real, calls = SimpleHTTPRequestHandler.do_GET, []

    def faltering(handler: SimpleHTTPRequestHandler) -> None:
        calls.append(handler.path)
        if len(calls) <= 2:
            handler.send_error(503)
        else:
            real(handler)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", faltering)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    result = run(make_job({"web": from_files(f"{address}/a.jsonl")}, tmp_path / "data"))
    assert raw_texts(Path(result.path), "web") == TEXTS and len(calls) == 3


def test_an_address_that_is_not_there_is_one_line(
    web: tuple[str, Path], make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^source 'web': http://.*/no.jsonl: no such file; check the path[^\n]*$"):
        run(make_job({"web": from_files(f"{web[0]}/no.jsonl")}, tmp_path / "data"))


KILLED = """
import os, signal, sys
from components.download import scores
from components.download.step import run
from manifests.spec import JobSpec, parse, read_yaml
real, seen = scores.rows, 0
def rows(*arguments):
    for row in real(*arguments):
        global seen
        seen += 1
        if seen == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
scores.rows = rows
run(parse(JobSpec, read_yaml(sys.argv[1])))
"""


def test_a_killed_download_keeps_finished_files_and_ends_the_same(
    make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(json_lines([f"file {i} text {j}" for j in range(5)]))
    origin = from_files(tmp_path / "*.jsonl")
    job, clean = make_job({"web": origin}, tmp_path / "killed"), make_job({"web": origin}, tmp_path / "clean")
    (tmp_path / "job.yaml").write_text(job.model_dump_json())
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "job.yaml")], stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    root = Path(job.stage_dir("raw"))
    before = state(root)
    assert {"web/part-00000.jsonl", "web/part-00001.jsonl.tmp"} <= set(before)
    assert "manifest.json" not in before and "web/part-00001.jsonl" not in before

    result = run(job)
    assert result.digest == run(clean).digest
    after = state(root)
    assert after["web/part-00000.jsonl"] == before["web/part-00000.jsonl"]
    assert not [name for name in after if name.endswith(".tmp")]


def broken(tmp_path: Path, what: str) -> str:
    """A path or pattern of something that cannot be used."""
    path = tmp_path / f"bad{what[what.index('.') :]}" if "." in what else tmp_path / "none"
    good = json_lines(TEXTS * 100)
    content = {
        "cut.jsonl.gz": gzip.compress(good)[:-20],
        "no.jsonl.gz": b"this is not gzip",
        "cut.jsonl.zst": zstd(good)[:-20],
        "no.jsonl.zst": b"this is not zstd",
        "no.parquet": b"PAR1 but not really",
        "no-json.jsonl": b'{"text": "fine"}\n{"text": \n',
        "array.jsonl": b'["text"]\n',
        "deep.jsonl": b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
        "column.jsonl": b'{"content": "x", "id": 1}\n',
        "number.jsonl": b'{"text": 5}\n',
        "latin.jsonl": '{"text": "\xe9"}\n'.encode("latin-1"),
        "latin.txt": "\xe9".encode("latin-1"),
        "empty.jsonl": b"",
        "table.xlsx": b"text\nx\n",
    }
    if what == "column.parquet":
        parquet(list(TEXTS), path, "content")
    elif what == "folder":
        path.mkdir()
    elif what == "glob":
        return str(tmp_path / "*.jsonl")
    elif what == "sample":
        return "sample://xx.jsonl.gz"
    elif what != "missing":
        path.write_bytes(content[what])
    return str(path)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut.jsonl.gz", r"bad\.jsonl\.gz: damaged or cut-off gzip"),
        ("no.jsonl.gz", r"bad\.jsonl\.gz: damaged or cut-off gzip"),
        ("cut.jsonl.zst", r"bad\.jsonl\.zst: damaged"),
        ("no.jsonl.zst", r"bad\.jsonl\.zst: damaged"),
        ("no.parquet", r"bad\.parquet: damaged or not Parquet"),
        ("no-json.jsonl", r"bad\.jsonl:2: not JSON"),
        ("array.jsonl", r"bad\.jsonl:1: a list; each line must be one JSON object"),
        ("deep.jsonl", r"bad\.jsonl:1: JSON nested too deeply"),
        ("column.jsonl", r"bad\.jsonl:1: no column 'text'; columns are content, id; set text_column to one of them"),
        ("column.parquet", r"bad\.parquet: no column 'text'; columns are id, content; set text_column"),
        ("number.jsonl", r"bad\.jsonl:1: column 'text' holds a int"),
        ("latin.jsonl", r"bad\.jsonl:1: not UTF-8"),
        ("latin.txt", r"bad\.txt: not UTF-8 at byte 0"),
        ("empty.jsonl", r"holds no text"),
        ("table.xlsx", r"bad\.xlsx: its suffix is not a known format; name the file one of \.jsonl"),
        ("missing", r"none: no such file"),
        ("folder", r"none: a folder; name the files in it"),
        ("glob", r"\*\.jsonl: no such file; check the path"),
        ("sample", r"sample://xx\.jsonl\.gz: no such sample; there are sample://chat\.jsonl\.gz"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(
    what: str, said: str, make_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    job = make_job({"web": from_files(broken(tmp_path, what))}, data)
    messages = list[str]()
    for _ in range(2):  # a second run refuses it again
        with pytest.raises(DataError) as caught:
            run(job)
        messages.append(str(caught.value))
    (message,) = set(messages)
    assert message.startswith("source 'web': ") and re.search(said, message) and "\n" not in message
    left = {path.name for path in data.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith(".tmp") or name == "manifest.json"]
    assert what == "empty.jsonl" or not [name for name in left if name.startswith("part-")]


def test_the_named_column_is_read(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    parquet(list(TEXTS), tmp_path / "a.parquet", "content")
    result = run(make_job({"web": from_files(tmp_path / "a.parquet")}, tmp_path / "data", None, "content"))
    assert raw_texts(Path(result.path), "web") == TEXTS


def test_two_downloads_of_the_same_data_do_not_meet(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    job = make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data")
    result = run(job)
    with open(Path(result.path) / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="another process is downloading there; wait for it or stop it"):
            run(job)
    assert run(job) == result


def test_the_digest_does_not_depend_on_where_the_files_lie(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        for i in range(2):
            Path(f"{i}.jsonl").write_bytes(json_lines([f"text {i}"]))
        digests.add(run(make_job({"web": from_files("*.jsonl")}, tmp_path / place / "data")).digest)
    assert len(digests) == 1


def test_a_disk_too_small_is_refused_before_any_work(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(VolumeError, match=r"has 0 bytes free, about \d{2,3} bytes are needed; make room or lower"):
        run(make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data"))
    assert not list(tmp_path.rglob("part-*"))


def test_a_disk_that_fills_up_is_one_line(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    job = make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data")

    replace = os.replace

    def full(old: object, new: Path) -> None:
        if new.name.startswith("part-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr("components.download.writer.os.replace", full)
        said = r"^source 'web': [^\n]*: the volume is full; make room and run again, finished work is kept$"
        with pytest.raises(VolumeError, match=said):
            run(job)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("manifest.json"))
    assert run(job).summary["documents"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_line(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(VolumeError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        run(make_job({"web": from_files(tmp_path / "a.jsonl")}, tmp_path / "data"))
