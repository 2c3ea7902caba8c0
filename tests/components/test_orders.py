"""Scores from rows to shards: each against its row and plain zlib, the same however the work is divided."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_cases import contents, texts

from components.download import step as download_step
from components.shards import step
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec, SpecError, job_from
from trainer.data.documents import SourceDocuments, open_shards, open_stream
from trainer.data.manifest import read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.fields import version_of

COLUMN = {"by": "column", "column": "quality", "bands": 5}


def source(file: Path, **fields: Any) -> dict[str, Any]:
    origin = {"kind": "files", "paths": [str(file)]}
    return {"domain": "en", "weight": 0.5, "licence": "CC0-1.0", "origin": origin} | fields


def job_of(directory: Path, sources: dict[str, Any], **changes: Any) -> JobSpec:
    base = {
        "preset": "tiny",
        "data": {"heldout_fraction": 0.1, "sources": dict.fromkeys(["ko", "en", "code", "math"]) | sources},
        "tokenizer": {"vocab_size": 640, "sample_bytes": 8000},
        "train": {"model": {"vocab_size": 640}},
        "shards": {"unit_bytes": 4096, "max_shard_bytes": 65536, "workers": 1},
        "storage": {"datasets_dir": str(directory), "checkpoints_dir": str(directory / "checkpoints")},
    }
    return job_from(base, changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rated.jsonl with a column of quality, and plain.jsonl; a text of white space has no score and no document."""
    directory, rng = tmp_path_factory.mktemp("rows"), random.Random(4)
    rated: list[dict[str, Any]] = [
        {"quality": rng.gauss(0, 2), "text": f"{n} {text}"} for n, text in enumerate(texts("en", 400))
    ]
    rated[7] = {"quality": None, "text": " \n"}
    rated[9]["quality"], rated[11]["quality"] = "0.5", 3
    (directory / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    plain = [{"text": f"{n} {text}"} for n, text in enumerate(texts("math", 400))]
    (directory / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return directory


def sources(rows: Path, rated: dict[str, Any] | None, plain: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "rated": source(rows / "rated.jsonl", order=rated),
        "plain": source(rows / "plain.jsonl", order=plain),
    }


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def made(job: JobSpec) -> str:
    raw = download_step.run(job)
    return step.run(job, raw, tokenizer_step.run(job, raw)).path


def test_scores_are_those_of_the_rows_for_any_units_and_workers_and_order_the_stream(
    rows: Path, tmp_path: Path
) -> None:
    both = sources(rows, COLUMN, {"by": "compression", "ascending": False})
    job = job_of(tmp_path / "one", both)
    path = made(job)
    units = {"unit_bytes": 1500, "workers": 2}
    again = made(job_of(tmp_path / "two", both, shards=units))
    names = [name for name in contents(path) if name != "manifest.json"]
    assert {name: contents(path)[name] for name in names} == {name: contents(again)[name] for name in names}
    assert sum(name.endswith(".scores") for name in names) == sum(name.endswith(".bin") for name in names) > 2

    manifest, tokenizer = read_manifest(path), Tokenizer.load(job.stage_dir("tokenizers"))
    listed = {entry.path for entry in manifest.files}
    assert {name for name in names if name.endswith(".scores")} <= listed, "so the digest covers them"
    quality = {row["text"]: row["quality"] for row in lines_of(rows / "rated.jsonl")}
    for name in ("rated", "plain"):
        for split in ("train", "heldout"):
            documents = SourceDocuments(Path(path), manifest, name, split)
            scores = documents.scores()
            for number, score in enumerate(scores.tolist()):
                text = tokenizer.decode(documents.tokens(number).tolist()[:-1])
                data = text.encode()
                wanted = quality[text] if name == "rated" else len(zlib.compress(data)) / len(data)
                assert score == np.float32(wanted)

    tokens = job.train_spec().tokens
    (rated, plain), stream = open_stream(tokens, *open_shards(tokens))
    drawn: dict[int, list[int]] = {0: [], 1: []}
    while min(stream.epochs(stream.cursor()).values()) < 1:
        for segment in stream.take(64):
            if segment.document not in drawn[segment.source]:
                drawn[segment.source].append(segment.document)
    for at, documents, bands, sign in ((0, rated, 5, 1), (1, plain, 10, -1)):
        scores = sign * documents.scores()[drawn[at]]
        ends = [-(-len(scores) * n // bands) for n in range(bands + 1)]
        for start, middle, stop in zip(ends, ends[1:], ends[2:], strict=False):
            assert scores[start:middle].max() <= scores[middle:stop].min()


def test_an_order_changes_only_what_it_must(rows: Path, tmp_path: Path) -> None:
    plain = job_of(tmp_path, sources(rows, None, None))
    changed = {}
    for name, order in {"length": {"by": "length"}, "compression": {"by": "compression"}, "column": COLUMN}.items():
        job = job_of(tmp_path, sources(rows, order, None))
        changed[name] = {stage for stage in job.keys if job.keys[stage] != plain.keys[stage]}
        assert job.run_name != plain.run_name and (version_of(plain), version_of(job)) == (1, 9)
        again = job.updated({"data": {"sources": {"rated": {"order": {"ascending": False, "bands": 3}}}}})
        assert again.keys == job.keys and again.run_name != job.run_name
        assert again.train_spec().tokens.mix["rated"].order.bands == 3
    assert changed["length"] == set() and changed["compression"] == {"shards"} and "raw" in changed["column"]
    made(plain)
    lines = lines_of(Path(plain.stage_dir("raw")) / "rated" / "part-00000.jsonl")
    assert all(line.keys() == {"text"} for line in lines)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("null", r"source 'rated': .*bad\.jsonl:2: column 'quality' holds nothing, but order\.column needs a finite"),
        ('"good"', r"bad\.jsonl:2: column 'quality' holds 'good', but order\.column needs a finite number in each row"),
        ("NaN", r"bad\.jsonl:2: column 'quality' holds 'nan', .*; fix or remove the row, or order by compression"),
        ("1e400", r"bad\.jsonl:2: column 'quality' holds 'inf'"),
        ("true", r"bad\.jsonl:2: column 'quality' holds 'True'"),
    ],
)
def test_a_row_without_a_score_is_named(tmp_path: Path, value: str, message: str) -> None:
    lines = '{"text": "One.", "quality": 1}\n{"text": "Two.", "quality": ' + value + "}\n"
    (tmp_path / "bad.jsonl").write_text(lines)
    job = job_of(tmp_path, {"rated": source(tmp_path / "bad.jsonl", weight=1.0, order=COLUMN)})
    with pytest.raises(DataError, match=message) as raised:
        download_step.run(job)
    assert "\n" not in str(raised.value)


def test_a_column_that_is_missing_is_told_by_the_name_of_its_option(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b'{"text": "One.", "score": 1}\n'), ("a.csv", b"text,score\nOne.,1\n")):
        (tmp_path / name).write_bytes(data)
        job = job_of(tmp_path, {"rated": source(tmp_path / name, weight=1.0, order=COLUMN)})
        with pytest.raises(DataError, match=r"no column 'quality'.* set order\.column to one of them"):
            download_step.run(job)
    order = COLUMN | {"column": "score"}
    path = made(job_of(tmp_path, {"rated": source(tmp_path / "a.csv", weight=1.0, order=order)}, data={}))
    scores = [
        SourceDocuments(Path(path), read_manifest(path), "rated", split).scores().tolist()
        for split in ("train", "heldout")
    ]
    assert scores[0] + scores[1] == [1.0]


def test_scores_of_contents_that_are_fetched_by_id_stay_with_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.download import blobs

    def contents_of(rows: Any, spec: Any) -> Any:
        """As the real one: it reads rows ahead, and a content may be missing."""
        for _, row in list(rows):
            yield None if row[0] == "id3" else f"Text of {row[0]}."

    monkeypatch.setattr(blobs, "contents", contents_of)
    lines = [json.dumps({"blob_id": f"id{n}", "text": "x", "quality": n / 4}) + "\n" for n in range(9)]
    with gzip.open(tmp_path / "ids.jsonl.gz", "wt") as file:
        file.writelines(lines)
    fetched = {"text_column": "blob_id", "blobs": {"url": "http://x/{id}", "encoding_column": None}, "order": COLUMN}
    job = job_of(tmp_path, {"rated": source(tmp_path / "ids.jsonl.gz", weight=1.0, **fetched)})
    raw = download_step.run(job)
    found = lines_of(Path(raw.path) / "rated" / "part-00000.jsonl")
    assert found == [{"text": f"Text of id{n}.", "score": n / 4} for n in range(9) if n != 3]


def test_shards_of_another_order_are_refused_and_a_damaged_score_is_found(rows: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, sources(rows, None, {"by": "compression"}))
    path = Path(made(job))
    tokens = job.train_spec().tokens.updated({"mix": {"rated": {"order": COLUMN}}})
    with pytest.raises(
        DataError, match="scores of source 'rated' are by compression, not by quality as its order; run the"
    ):
        open_stream(tokens, *open_shards(tokens))
    raw = download_step.run(job)
    tokenizer = tokenizer_step.run(job, raw)
    digests = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in path.glob("plain-*")}
    (path / "plain-train-00000.scores").write_bytes(b"YAOSCOR1")
    step.run(job, raw, tokenizer)
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).digest() for file in path.glob("plain-*")}


def test_megatron_refuses_an_order() -> None:
    small = {
        "preset": "small",
        "data": {"sources": {"en": {"order": {"by": "length"}}}},
        "train": {"engine": "megatron"},
    }
    with pytest.raises(SpecError, match=r"data\.sources\.en\.order: Megatron shuffles the rows itself; remove it"):
        job_from(small)
