"""The hygiene step: its files beside the raw text, killed runs, and the documents that shards omit because of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from raw_cases import contents, small_job, texts, write_raw

from components.hygiene import step
from components.hygiene.attributes import decisions, dropped
from components.lock import alone
from manifests.spec import JobSpec
from trainer.data.jsonl import documents
from trainer.data.manifest import DataError, StageResult, read_manifest, verify, write_manifest
from trainer.errors import LaunchError, VolumeError

QUESTION = "Which of the following thirteen words in a row shall no model have seen before its test?"


def job_for(directory: Path, **changes: Any) -> JobSpec:
    return small_job(directory, {"hygiene": {"exact_duplicates": True}} | changes)


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    """Drops duplicates, and documents with the only question of an evaluation set."""
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n" + json.dumps({"question": "2?"}))
    exam = {"origin": {"kind": "files", "paths": [str(tmp_path / "exam.jsonl")]}, "text_column": "question"}
    return job_for(tmp_path, hygiene={"exact_duplicates": True, "evaluation": {"exam": exam}})


@pytest.fixture
def raw(job: JobSpec) -> StageResult:
    return write_raw(job, extra={"en": [f"Found on the web: {QUESTION.upper()} Answer: B"]})


def left_out(job: JobSpec, raw: StageResult) -> dict[str, set[tuple[str, str]]]:
    """(file, text) of dropped documents by source, read back only from their offsets."""
    found: dict[str, set[tuple[str, str]]] = {}
    for entry in read_manifest(raw.path).files:
        offsets = dropped(job.stage_dir("hygiene"), entry.path)
        every = dict(documents(Path(raw.path) / entry.path))
        assert offsets <= every.keys()
        found.setdefault(entry.source or "", set()).update((entry.path, every[offset]) for offset in offsets)
    return found


def test_marks_what_is_left_out_and_leaves_the_raw_text_alone(job: JobSpec, raw: StageResult) -> None:
    before = contents(raw.path)
    result = step.run(job, raw)
    assert contents(raw.path) == before
    assert (result.kind, result.path, result.digest) == (raw.kind, raw.path, raw.digest)
    manifest = read_manifest(job.stage_dir("hygiene"), "hygiene")
    verify(job.stage_dir("hygiene"), manifest)
    assert decisions(job, read_manifest(raw.path)) == manifest

    # Brute force: every text except its first occurrence, in the order of the files; and the question.
    seen, expected, size = set[str](), dict[str, set[tuple[str, str]]](), 0
    count = 0
    for entry in read_manifest(raw.path).files:
        for _, text in documents(Path(raw.path) / entry.path):
            key = " ".join(text.split())
            if key in seen or QUESTION.casefold() in text.casefold():
                expected.setdefault(entry.source or "", set()).add((entry.path, text))
                count, size = count + 1, size + len(text.encode())
            seen.add(key)
    assert left_out(job, raw) == expected
    assert (manifest.counts().documents, manifest.counts().text_bytes) == (count, size)
    assert result.summary["left_out_documents"] == count


def test_the_report_names_each_filter_and_source_with_samples(job: JobSpec, raw: StageResult) -> None:
    step.run(job, raw)
    directory = Path(job.stage_dir("hygiene"))
    report = json.loads((directory / "report.json").read_bytes())
    found = report["left_out"]
    manifest = read_manifest(directory)
    for source in job.data.sources:
        assert found["all"][source]["documents"] == manifest.counts(source).documents > 0
        assert found["exact_duplicates"][source]["samples"]
    (sample,) = found["contamination"]["en"]["samples"]
    assert sample["evaluation"] == "exam" and sample["text"] == 0 and sample["start"].startswith("Found on the web")
    assert sample["words"] in QUESTION.casefold()
    assert report["settings"]["contamination"]["evaluation_texts_too_short"] == 1
    page = (directory / "report.md").read_text(encoding="utf-8")
    assert "Found on the web" in page and "## contamination" in page


def test_nothing_is_done_twice_and_other_raw_text_is_judged_anew(
    job: JobSpec, raw: StageResult, capsys: pytest.CaptureFixture[str]
) -> None:
    step.run(job, raw)
    directory = Path(job.stage_dir("hygiene"))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert step.run(job, raw).digest == raw.digest
    assert "unchanged and verified" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before

    (damaged := next(directory.glob("en/*.jsonl"))).write_bytes(b"")
    (directory / "somebody's").mkdir()
    step.run(job, raw)
    assert damaged.read_bytes() and (directory / "somebody's").is_dir()

    for path in Path(raw.path).rglob("*.jsonl"):
        path.unlink()
    other = write_raw(job, documents=20)
    with pytest.raises(DataError, match="made for other raw text; run the hygiene step again"):
        decisions(job, read_manifest(other.path))
    step.run(job, other)
    assert decisions(job, read_manifest(other.path)) is not None


def test_what_an_earlier_version_decided_holds(
    job: JobSpec, raw: StageResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs were started on it. Earlier settings do not mention invisible characters."""
    step.run(job, raw)
    directory = Path(job.stage_dir("hygiene"))
    now = read_manifest(directory)
    before = {
        name: {k: v for k, v in each.items() if k != "invisible_characters"} for name, each in now.settings.items()
    }
    assert before != now.settings
    former = now.model_copy(update={"settings": before})
    write_manifest(directory, former)
    capsys.readouterr()
    step.run(job, raw)
    assert read_manifest(directory).digest == former.digest
    assert f"to decide again, remove {directory}" in capsys.readouterr().out
    (directory / "manifest.json").unlink()
    step.run(job, raw)
    assert read_manifest(directory).digest == now.digest


def test_a_job_without_hygiene_leaves_nothing_out(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    assert step.run(job, raw) == raw
    assert decisions(job, read_manifest(raw.path)) is None
    assert dropped(None, "en/part-00000.jsonl") == frozenset()
    assert not Path(job.stage_dir("hygiene")).exists()
    assert job.shards_key != job_for(tmp_path).shards_key


KILLED = """
import sys
from pathlib import Path
from components.hygiene.step import run
from manifests.spec import JobSpec, parse, read_yaml
from trainer.data.manifest import StageResult
if __name__ == "__main__":
    job = parse(JobSpec, read_yaml(sys.argv[1]))
    run(job, StageResult.from_json(Path(sys.argv[2]).read_text()))
"""


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_and_the_number_of_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    clean = job_for(tmp_path / "clean", shards={"workers": 1})
    step.run(clean, write_raw(clean, documents=3000))
    golden = contents(clean.stage_dir("hygiene"))
    job = job_for(tmp_path / "killed", shards={"workers": workers})
    raw = write_raw(job, documents=3000)
    (tmp_path / "job.yaml").write_text(job.model_dump_json())
    (tmp_path / "raw.json").write_text(raw.to_json())
    (tmp_path / "run.py").write_text(KILLED)
    killed = 0
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "job.yaml"), str(tmp_path / "raw.json")]
    for seconds in (0, 0.05, 0.1, 0.2):  # the first is killed while it scans, on every machine; the others at any point
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        scans = Path(job.stage_dir("hygiene")) / "scans"
        while process.poll() is None and not scans.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    step.run(job, raw)
    assert contents(job.stage_dir("hygiene")) == golden


def test_only_one_process_at_a_time(job: JobSpec, raw: StageResult) -> None:
    with (
        alone(Path(job.stage_dir("hygiene")), "waiting"),
        pytest.raises(LaunchError, match="another process is deciding"),
    ):
        step.run(job, raw)


def test_a_full_disk_is_one_line_and_scans_stay(
    job: JobSpec, raw: StageResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(step, "atomic_write", full)
        with pytest.raises(VolumeError, match=r"^[^\n]*: the volume is full; make room and run again[^\n]*$"):
            step.run(job, raw)
    directory = Path(job.stage_dir("hygiene"))
    assert not (directory / "manifest.json").exists() and len(list((directory / "scans").iterdir())) == 8
    assert step.run(job, raw).summary["left_out_documents"]


@pytest.mark.parametrize(
    ("exam", "said"),
    [
        ({"paths": ["/none/x.jsonl"]}, r"^hygiene.evaluation.exam: /none/x.jsonl: no such file; check the path[^\n]*$"),
        ({}, r"^hygiene.evaluation.exam: [^\n]*exam.jsonl:1: no column 'text'; columns are question[^\n]*$"),
    ],
)
def test_evaluation_texts_that_cannot_be_had_are_named(
    job: JobSpec, raw: StageResult, exam: dict[str, Any], said: str
) -> None:
    spec = job.hygiene.evaluation["exam"].updated({"text_column": None, "origin": exam})
    wrong = job.model_copy(update={"hygiene": job.hygiene.model_copy(update={"evaluation": {"exam": spec}})})
    with pytest.raises(DataError, match=said):
        step.run(wrong, raw)


def test_attributes_that_are_gone_or_damaged_are_named(job: JobSpec, raw: StageResult) -> None:
    step.run(job, raw)
    path = Path(job.stage_dir("hygiene")) / "en" / "part-00000.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"part-00000.jsonl: damaged; remove it and run the hygiene step again"):
        dropped(job.stage_dir("hygiene"), "en/part-00000.jsonl")
    path.unlink()
    with pytest.raises(DataError, match=r"part-00000.jsonl: not there; run the hygiene step"):
        dropped(job.stage_dir("hygiene"), "en/part-00000.jsonl")
    with pytest.raises(DataError, match=r"part-00000.jsonl: missing"):
        decisions(job, read_manifest(raw.path))


def test_the_raw_cases_hold_duplicates() -> None:
    assert all(made[-1] in made[:-1] for made in (texts(source, 10) for source in ("ko", "en", "code", "math")))


def test_near_duplicates_and_quality_are_in_files_and_report(tmp_path: Path) -> None:
    job = job_for(tmp_path, hygiene={"near_duplicates": {}, "quality": {"domains": ["en"]}})
    words = [f"word{n} of the" for n in range(80)]
    raw = write_raw(job, extra={"en": [" ".join(words), " ".join([*words, "again"])], "ko": ["짧은 글"]})
    step.run(job, raw)
    directory = Path(job.stage_dir("hygiene"))
    rows = [
        json.loads(line) for path in sorted(directory.glob("*/part-*.jsonl")) for line in path.read_text().splitlines()
    ]
    near = [row for row in rows if row["filter"] == "near_duplicates"]
    assert any(row["similarity"] > 0.9 and row["same_as"]["file"].startswith("en/") for row in near)
    assert {row["rule"] for row in rows if row["filter"] == "quality"} >= {"words"}
    assert not [row for path in directory.glob("ko/*") for row in path.read_text().splitlines() if '"quality"' in row]
    report = (directory / "report.md").read_text()
    assert "## near_duplicates" in report and "- threshold: 0.8" in report and "## quality" in report
    verify(directory, read_manifest(directory, "hygiene"))
