from __future__ import annotations

import json
from pathlib import Path

import pytest
from raw_cases import contents, small_job, texts, write_raw

from components import sampling
from components.lock import alone
from components.tokenizer import step
from trainer.data.manifest import DataError, Manifest, file_entry, read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.errors import LaunchError, VolumeError


def test_trains_once_and_says_when_there_is_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    result = step.run(job, raw)
    tokenizer = Tokenizer.load(result.path)
    assert tokenizer.vocab_size == result.summary["vocab_size"] == 640
    assert result.path == job.stage_dir("tokenizers")
    made = contents(result.path)
    capsys.readouterr()
    assert step.run(job, raw) == result
    assert "unchanged and verified" in capsys.readouterr().out
    (Path(result.path) / "tokenizer.json").write_bytes(made["tokenizer.json"][:-1])
    assert step.run(job, raw) == result and contents(result.path) == made


def test_reports_the_bytes_of_a_token_by_domain(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    result = step.run(job, write_raw(job))
    tokenizer = Tokenizer.load(result.path)
    for source in job.data.sources:
        everything = texts(source, 150)
        size = sum(len(text.encode()) for text in everything) / sum(len(tokenizer.encode(t)) for t in everything)
        assert result.summary[f"bytes_per_token_{source}"] == round(size, 3)


def test_sample_follows_the_mix_and_is_spread_over_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WINDOW_BYTES", 1000)
    manifest = _numbered(tmp_path, 10_000)
    everything = list(sampling.sample(tmp_path, manifest, "ko", 10**9))
    assert sorted(everything) == sorted(f"{n:07d}" for n in range(10_000))
    some = list(sampling.sample(tmp_path, manifest, "ko", 7_000))
    assert len(some) == 1000 and some == everything[:1000]
    thirds = [sum(lower <= int(text) < lower + 3334 for text in some) for lower in (0, 3333, 6666)]
    assert all(250 < count < 420 for count in thirds)


def _numbered(directory: Path, count: int) -> Manifest:
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": f"{n:07d}"}) + "\n" for n in range(count)))
    return Manifest(kind="raw", files=[file_entry(directory, "a.jsonl", source="ko")])


def test_a_mix_or_size_of_its_own_gives_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    other = small_job(tmp_path, {"tokenizer": {"sample_bytes": 2000}})
    first, second = step.run(job, raw), step.run(other, raw)
    assert first.path != second.path and first.digest != second.digest
    assert read_manifest(first.path).inputs == {"raw": raw.digest}


def test_raw_text_that_changed_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    path = Path(raw.path) / "ko" / "part-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"part-00000\.jsonl: has \d+ bytes, the manifest says"):
        step.run(job, raw)
    assert not Path(job.stage_dir("tokenizers")).exists()


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    with (
        alone(Path(job.stage_dir("tokenizers")), "waiting"),
        pytest.raises(LaunchError, match="another process is train"),
    ):
        step.run(job, raw)
    result = step.run(job, raw)
    with alone(Path(result.path), "waiting"):  # any number of runs can read the existing files
        assert step.run(job, raw) == result


def test_a_full_volume_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    monkeypatch.setattr(step, "atomic_write", lambda *_: Path("/dev/full").write_bytes(bytes(10**5)))
    with pytest.raises(VolumeError, match=r"tokenizers/\w+: the volume is full; make room and run again"):
        step.run(job, raw)
    assert not (Path(job.stage_dir("tokenizers")) / "manifest.json").exists()
