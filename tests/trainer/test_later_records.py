"""Manifests, results of steps and checkpoints of a later version: unknown fields are ignored with one warning."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from trainer import fields
from trainer.checkpoints.checkpoint import MANIFEST, CheckpointManifest, read_manifest
from trainer.data import manifest as data
from trainer.data.stages import open_stage
from trainer.errors import CheckpointError, DataError


def sealed(value: dict[str, Any]) -> str:
    """Seal them like a version that knows these fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def _nothing_told_yet() -> None:
    fields._warn_of.cache_clear()


@pytest.mark.parametrize("kind", ["raw", "hygiene", "tokenizer", "shards"])
def test_a_manifest_keeps_its_digest(kind: data.Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_bytes(b"text")
    source = data.SourceEntry(domain="en", licence="CC0-1.0", origin="made", revision="1")
    made = data.Manifest(kind=kind, sources={"s": source}, files=[data.file_entry(tmp_path, "a", source="s")])
    value = made.stored() | {"shape": {"of": [1.5, None]}}
    value["files"][0]["words"] = 7
    value["sources"]["s"]["language"] = "en"
    file = tmp_path / data.MANIFEST_NAME
    file.write_text(json.dumps({"digest": sealed(value)} | value))
    for _ in range(2):
        read = data.read_manifest(tmp_path, kind)
    assert read.digest == sealed(value) and read.counts().files == 1
    assert [each.args for each in caplog.records] == [
        (str(file), "a later yaongi", "shape, sources.*.language, files.*.words")
    ]
    result = data.StageResult(kind=kind, path=str(tmp_path), digest=read.digest)
    assert open_stage(result) == read

    file.write_text(json.dumps({"digest": made.digest} | value))
    with pytest.raises(DataError, match="changed after it was written"):
        data.read_manifest(tmp_path)
    value["files"][0]["bytes"] = "many"
    file.write_text(json.dumps({"digest": sealed(value)} | value))
    with pytest.raises(DataError, match="not a manifest"):
        data.read_manifest(tmp_path)
    file.write_text(json.dumps({"digest": ""} | value | {"format_version": 2}))
    with pytest.raises(DataError, match=r"later yaongi \(format 2, this one reads 1\)"):
        data.read_manifest(tmp_path)


def test_a_step_takes_the_result_of_a_later_one(caplog: pytest.LogCaptureFixture) -> None:
    result = data.StageResult(kind="raw", path="/x", digest="d")
    read = data.StageResult.from_json(json.dumps(json.loads(result.to_json()) | {"seconds": 3}))
    assert (read.kind, read.path, read.digest) == ("raw", "/x", "d")
    assert len(caplog.records) == 1 and caplog.records[0].args[2] == "seconds"
    with pytest.raises(DataError):
        data.StageResult.from_json('{"kind": "raw", "seconds": 3}')


def test_a_checkpoint_says_who_wrote_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = CheckpointManifest(
        step=4, spec={}, code_version="9.1", digests={}, cursor={}, world_size=1, scalars={}, files={}
    ).model_dump(mode="json", exclude={"digest"})
    value |= {"mesh": [2, 4]}
    (tmp_path / MANIFEST).write_text(json.dumps(value | {"digest": sealed(value)}))
    assert read_manifest(tmp_path).step == 4
    assert [each.args[1:] for each in caplog.records] == [("a later yaongi (9.1)", "mesh")]
    (tmp_path / MANIFEST).write_text(json.dumps(value | {"digest": sealed(value), "mesh": []}))
    with pytest.raises(CheckpointError, match="digest differs"):
        read_manifest(tmp_path)
