"""Sources on the Hub, with a server on this machine that implements its API and fails on request."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, HubServer
from hub_worker import WORKER, Hub

from trainer.data.manifest import read_manifest, verify
from trainer.exitcodes import ExitCode

CARD = b"""---
configs:
- config_name: ko
  data_files:
  - {split: train, path: ko/train-*}
  - {split: test, path: ko/test-*}
- config_name: en
  data_files: en/*
---
# Texts
"""
FIRST, SECOND = "ko/train-00000.parquet", "ko/train-00001.parquet"


def texts_of(number: int, count: int) -> list[str]:
    return [f"문서 {number}-{i} " + "본문 " * 60 for i in range(count)]


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), out, compression="none", use_dictionary=False)
    return out.getvalue()


FILES = {
    "README.md": CARD,
    FIRST: parquet(texts_of(0, 1200)),
    SECOND: parquet(texts_of(1, 300)),
    "ko/test-00000.parquet": parquet(texts_of(2, 3)),
    "en/a.jsonl": b'{"text": "One."}\n{"text": "Two."}\n',
}


@pytest.fixture
def hub(hub: Hub) -> Hub:
    hub.server.files = dict(FILES)
    return hub


def raw_texts(directory: Path) -> list[str]:
    parts = sorted((directory / "web").glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_bytes().splitlines()]


def job(make_job, tmp_path: Path, max_bytes: int | None = None, **origin: Any) -> dict[str, Any]:
    chosen = {"kind": "hub", "dataset": "org/texts", "config": "ko"} | origin
    return make_job({"web": chosen}, tmp_path, max_bytes).model_dump(mode="json")


def test_reads_config_and_split_through_a_reset_and_a_server_error(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {"api": ["500"], FIRST: ["429", "reset", "503"]}
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None
    directory = Path(result["path"])
    assert raw_texts(directory) == texts_of(0, 1200) + texts_of(1, 300)
    manifest = read_manifest(directory, "raw")
    verify(directory, manifest)
    assert manifest.sources["web"].revision == COMMIT
    assert result["summary"]["documents"] == 1500
    continued = [wanted for wanted in hub.server.ranges_of(FIRST) if wanted]
    assert continued and all(int(wanted.removeprefix("bytes=").rstrip("-")) > 0 for wanted in continued)
    assert hub.server.ranges_of("test-00000.parquet") == []
    assert hub.server.tokens <= {None, "Bearer hf_secret"} and "Bearer hf_secret" in hub.server.tokens
    assert not (directory / "web" / ".fetch").exists()

    hub.server.requests.clear()
    again, _ = hub.run(job(make_job, tmp_path))
    assert again == result
    assert hub.server.requests == []


def test_other_bytes_than_the_checksum_says_are_refused(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {FIRST: ["wrong", "wrong"]}
    result, error = hub.run(job(make_job, tmp_path))
    assert result is None and error is not None
    assert error.startswith(f"source 'web': org/texts/{FIRST}: differed from the Hub's checksum")
    assert "\n" not in error
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".lock", "journal.json"]

    hub.server.faults = {FIRST: ["wrong"]}  # once only: fetched again and accepted
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None and result["summary"]["documents"] == 1500


def test_small_files_outside_lfs_are_proved_by_their_git_id(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {"en/a.jsonl": ["wrong", "wrong"]}
    assert "checksum" in (hub.run(job(make_job, tmp_path, config="en"))[1] or "")
    assert hub.run(job(make_job, tmp_path, config="en"))[0] is not None


def test_what_a_failed_run_fetched_is_continued(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {SECOND: ["reset", "403"]}
    result, error = hub.run(job(make_job, tmp_path))
    assert result is None and error is not None and "\n" not in error
    assert SECOND in error and "access refused" in error and "HF_TOKEN" in error
    hub.server.requests.clear()
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None and result["summary"]["documents"] == 1500
    assert hub.server.ranges_of(FIRST) == []  # its part was finished
    (wanted,) = hub.server.ranges_of(SECOND)
    assert wanted and wanted.startswith("bytes=") and wanted != "bytes=0-"


def test_a_copy_longer_than_the_file_is_fetched_again(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {FIRST: ["reset", "403"]}
    assert hub.run(job(make_job, tmp_path))[0] is None
    (copy,) = tmp_path.rglob(".fetch/*")
    copy.write_bytes(FILES[FIRST] + b"too much")
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None
    assert raw_texts(Path(result["path"])) == texts_of(0, 1200) + texts_of(1, 300)


def test_stops_at_the_byte_budget(hub: Hub, make_job, tmp_path: Path) -> None:
    result, error = hub.run(job(make_job, tmp_path, max_bytes=20_000))
    assert error is None and result is not None
    longest = max(len(text.encode()) for text in texts_of(0, 1200))
    assert 20_000 <= result["summary"]["text_bytes"] < 20_000 + longest
    assert hub.server.ranges_of(SECOND) == []


def test_more_steps_extend_a_source_that_the_tokens_needed_had_cut(hub: Hub, make_job, tmp_path: Path) -> None:
    few = job(make_job, tmp_path)
    few["train"]["steps"] = 4
    few["tokenizer"]["sample_bytes"] = 1000
    result, error = hub.run(few)
    assert error is None and result is not None
    needed = 4 * few["train"]["batch"]["tokens_per_step"] * 5
    assert needed <= result["summary"]["text_bytes"] < 2 * needed
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None and result["summary"]["documents"] == 1500
    assert raw_texts(Path(result["path"])) == texts_of(0, 1200) + texts_of(1, 300)


def test_a_pause_that_the_hub_asks_for_is_kept(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {FIRST: ["429+1"]}
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None and result["summary"]["documents"] == 1500
    first, second = (at for at, path in hub.server.times if path.endswith(f"resolve/{COMMIT}/{FIRST}"))
    assert second - first >= 1.0


def test_a_file_of_the_wrong_length_is_refused(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {FIRST: ["short"] * 20}
    result, error = hub.run(job(make_job, tmp_path))
    assert result is None and error is not None and FIRST in error and "\n" not in error
    assert not list(tmp_path.rglob("part-*")) and not list(tmp_path.rglob("manifest.json"))
    hub.server.faults = {FIRST: ["short"]}
    assert hub.run(job(make_job, tmp_path))[1] is None


def test_a_branch_that_moved_is_said_and_the_data_stays_at_its_commit(hub: Hub, make_job, tmp_path: Path) -> None:
    hub.server.faults = {SECOND: ["403"]}
    assert hub.run(job(make_job, tmp_path))[0] is None
    hub.server.commits["org/texts"] = moved = "f" * 40
    result, error = hub.run(job(make_job, tmp_path))
    assert error is None and result is not None and result["summary"]["documents"] == 1500
    assert read_manifest(result["path"]).sources["web"].revision == COMMIT
    assert f"org/texts moved: main is at {moved}; this download continues with {COMMIT}" in hub.said
    fresh, error = hub.run(job(make_job, tmp_path / "fresh"))
    assert error is None and fresh is not None
    assert read_manifest(fresh["path"]).sources["web"].revision == moved


@pytest.mark.parametrize("gone", ["dataset", "files"])
def test_a_source_that_vanished_is_one_line_and_what_is_done_stays(
    hub: Hub, make_job, tmp_path: Path, gone: str
) -> None:
    hub.server.faults = {SECOND: ["403"]}
    assert hub.run(job(make_job, tmp_path))[0] is None
    (part,) = tmp_path.rglob("part-*.jsonl")
    before = part.read_bytes()
    if gone == "dataset":
        del hub.server.datasets["org/texts"]
    else:
        hub.server.files = {"README.md": CARD}
    result, error = hub.run(job(make_job, tmp_path))
    assert result is None and error is not None and "\n" not in error
    said = "no such dataset on the Hub" if gone == "dataset" else f"{SECOND}: no longer on the Hub at commit {COMMIT}"
    assert error.startswith("source 'web': org/texts") and said in error
    assert part.read_bytes() == before and not list(tmp_path.rglob("manifest.json"))


def test_files_are_chosen_by_globs_and_read_in_the_order_of_their_hashes(hub: Hub, make_job, tmp_path: Path) -> None:
    lines = {f"data/{topic}-{n}.jsonl": f'{{"text": "{topic}-{n}"}}\n'.encode() for topic in "abc" for n in range(8)}
    hub.server.files = lines | {"README.md": CARD, "data/x.csv": b"not to be read"}
    result, error = hub.run(job(make_job, tmp_path, config=None, files=["data/*.jsonl", "!data/b-*", "!data/?-7*"]))
    assert error is None and result is not None
    wanted = [name for name in lines if "b-" not in name and "-7" not in name]
    by_hash = sorted(wanted, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert raw_texts(Path(result["path"])) == [name[5:].removesuffix(".jsonl") for name in by_hash]
    assert by_hash != sorted(wanted)


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"config": None, "files": ["none/*"]}, "org/texts: no file matches none/*; check origin.files"),
        ({"revision": "a" * 40}, f"org/texts: has no revision '{'a' * 40}'"),
        ({"dataset": "org/none"}, "org/none: no such dataset on the Hub"),
        ({"dataset": "a/b/c"}, "a/b/c: not a dataset name"),
        ({"config": None}, "['ko', 'en']; set origin.config"),
        ({"revision": "v9"}, "org/texts: has no revision 'v9'"),
        ({"config": "fr"}, "Available: ['ko', 'en']"),
        ({"split": "dev"}, "no split 'dev'; splits are train, test"),
    ],
)
def test_what_does_not_exist_is_named(hub: Hub, make_job, tmp_path: Path, origin: dict[str, Any], said: str) -> None:
    result, error = hub.run(job(make_job, tmp_path, **origin))
    assert result is None and error is not None
    assert error.startswith("source 'web': ") and said in error and "\n" not in error
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("origin", [{}, {"config": None, "files": ["ko/*"]}])
def test_a_gated_dataset_is_said_to_be_one(
    hub: Hub, make_job, tmp_path: Path, origin: dict[str, Any], status: int
) -> None:
    hub.server.gated = status
    result, error = hub.run(job(make_job, tmp_path, **origin))
    assert result is None and error is not None
    assert "access refused; accept the dataset's terms on its page on the Hub and set HF_TOKEN" in error


def test_an_unreachable_hub_is_one_line(make_job, tmp_path: Path) -> None:
    with HubServer({}) as gone:
        address = gone.url
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(job(make_job, tmp_path)) + "\n",
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    answer = json.loads(done.stdout)
    error = answer["error"]
    assert error.startswith("source 'web': org/texts: the Hub cannot be read") and "\n" not in error
    assert answer["code"] == ExitCode.UNAVAILABLE and "Errno" not in error + answer["said"]
