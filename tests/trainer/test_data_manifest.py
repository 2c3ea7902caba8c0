from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.data.manifest import (
    DataError,
    FileEntry,
    Manifest,
    SourceEntry,
    StageResult,
    file_entry,
    read_manifest,
    verify,
    write_manifest,
)
from trainer.data.stages import open_stage, reusable
from trainer.exitcodes import ExitCode
from trainer.files import checksum


def test_data_code_of_the_slim_image_needs_no_torch() -> None:
    modules = "trainer.data.plan, trainer.data.tokenizer, components.shards.step, components.tokenizer.step"
    code = f"import sys, {modules}; print(*({{'torch', 'kfp', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished directory of two files."""
    (tmp_path / "ko").mkdir()
    (tmp_path / "ko" / "part-00000.jsonl").write_text('{"text": "가"}\n')
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    files = [
        file_entry(tmp_path, "ko/part-00000.jsonl", "sha256", source="ko", documents=1, text_bytes=3),
        file_entry(tmp_path, "b.bin", source="en", split="train", documents=2, tokens=128),
    ]
    entry = SourceEntry(domain="ko", licence="CC-BY-SA-4.0", origin="files", revision="1")
    write_manifest(tmp_path, Manifest(kind="raw", inputs={"a": "1"}, sources={"ko": entry}, files=files))
    return tmp_path


def test_reads_what_was_written_and_verifies(stage: Path) -> None:
    manifest = read_manifest(stage, "raw")
    verify(stage, manifest)
    assert manifest.counts("ko").text_bytes == 3
    assert manifest.counts(split="train").tokens == 128
    assert manifest.sources["ko"].licence == "CC-BY-SA-4.0"
    assert reusable(stage, "raw", {"a": "1"}, {}) == (manifest, "unchanged and verified")
    assert not list(stage.rglob("*.tmp"))


def test_checksums_are_those_of_other_tools(stage: Path) -> None:
    # From coreutils' sha256sum, and xxHash's published value for no input.
    assert read_manifest(stage).files[0].checksum == "27ef2d57b072944c9db0e374656e6ba8f74038994041dab3b008105241b23087"
    (stage / "empty").touch()
    assert checksum(stage / "empty", "xxh3_128") == "99aa06d3014798d86001c324468d497f"


def test_any_change_of_the_manifest_is_refused(stage: Path) -> None:
    path = stage / "manifest.json"
    value = json.loads(path.read_bytes())
    value["files"][1]["tokens"] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"manifest\.json: changed after it was written"):
        read_manifest(stage)


def test_every_truncation_of_the_manifest_is_refused(stage: Path) -> None:
    data = (stage / "manifest.json").read_bytes()
    for size in range(len(data) - 2):
        (stage / "manifest.json").write_bytes(data[:size])
        with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
            read_manifest(stage)


@pytest.mark.parametrize("name", ["ko/part-00000.jsonl", "b.bin"])
def test_flipped_truncated_and_missing_files_are_named(stage: Path, name: str) -> None:
    manifest = read_manifest(stage)
    good = (stage / name).read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        (stage / name).write_bytes(bad)
        with pytest.raises(DataError, match=f"{name}: its content differs"):
            verify(stage, manifest)
    (stage / name).write_bytes(good[:-1])
    with pytest.raises(DataError, match=f"{name}: has {len(good) - 1} bytes, the manifest says {len(good)}"):
        verify(stage, manifest, sizes_only=True)
    (stage / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        verify(stage, manifest, sizes_only=True)
    assert reusable(stage, "raw", {"a": "1"}, {})[0] is None


def test_a_file_that_cannot_be_read_is_named(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, algorithm: str) -> str:
        raise OSError(5, "Input/output error")

    manifest = read_manifest(stage)
    monkeypatch.setattr("trainer.data.manifest.checksum", fail)
    with pytest.raises(DataError, match=r"jsonl: cannot be read \(Input/output error\); check the volume") as error:
        verify(stage, manifest)
    assert error.value.code == ExitCode.VOLUME
    assert type(error.value)(str(error.value)).code == ExitCode.VOLUME, "as one is told of by another step or rank"
    assert reusable(stage, "raw", {"a": "1"}, {}) == (None, str(error.value)), "it is made anew"


def test_other_inputs_or_settings_are_not_reused(stage: Path) -> None:
    assert reusable(stage, "raw", {"a": "2"}, {}) == (None, "its inputs changed")
    assert reusable(stage, "raw", {"a": "1"}, {"x": 1}) == (None, "its settings changed")
    assert reusable(stage / "ko", "raw", {}, {}) == (None, "not made yet")


def test_wrong_kind_and_missing_manifest_say_what_to_do(stage: Path) -> None:
    with pytest.raises(DataError, match="holds raw, expected shards"):
        read_manifest(stage, "shards")
    with pytest.raises(DataError, match="run the step that makes this directory"):
        read_manifest(stage / "ko")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ""])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the manifest's directory"):
        FileEntry(path=path, bytes=1, algorithm="sha256", checksum="0")


def test_stage_result_travels_as_json(stage: Path) -> None:
    manifest = read_manifest(stage)
    result = StageResult(kind="raw", path=str(stage), digest=manifest.digest, summary={"documents": 1, "rate": 0.5})
    assert StageResult.from_json(result.to_json()) == result
    assert open_stage(result) == manifest
    with pytest.raises(DataError, match="changed since the step before"):
        open_stage(result.model_copy(update={"digest": "0"}))
    with pytest.raises(DataError, match="the result of the step before cannot be read"):
        StageResult.from_json('{"kind": 1}')
