"""The shards step: its contents against the raw text; the same bytes after any kills and with any number of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash
from raw_cases import contents, small_job, texts, write_raw

from components.lock import alone
from components.shards import step, units
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec
from trainer.data.format import Shard
from trainer.data.manifest import DataError, StageResult, read_manifest
from trainer.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult, StageResult]:
    directory = tmp_path_factory.mktemp("inputs")
    job = small_job(directory)
    raw = write_raw(job)
    return directory, raw, tokenizer_step.run(job, raw)


@pytest.fixture(scope="module")
def golden(inputs: tuple[Path, StageResult, StageResult], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    directory = tmp_path_factory.mktemp("golden")
    return contents(step.run(small_job(directory), *inputs[1:]).path)


def test_holds_each_document_once_on_its_side(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    job = small_job(tmp_path)
    result = step.run(job, *inputs[1:])
    manifest = read_manifest(result.path, "shards")
    tokenizer = Tokenizer.load(inputs[2].path)
    for source in job.data.sources:
        for split in ("train", "heldout"):
            found, counted = [], 0
            for entry in manifest.select(source, split):
                if entry.path.endswith(".idx"):
                    continue
                assert entry.bytes <= job.shards.max_shard_bytes
                shard = Shard(Path(result.path) / entry.path.removesuffix(".bin"))
                ids = [shard.document(n).tolist() for n in range(len(shard))]
                assert all(document[-1] == 0 and 0 not in document[:-1] for document in ids)
                here = [tokenizer.decode(document[:-1]) for document in ids]
                assert (entry.documents, entry.tokens) == (len(ids), sum(map(len, ids)))
                assert entry.text_bytes == sum(len(text.encode()) for text in here)
                found += here
                counted += entry.documents
            in_files = [t for part in range(2) for t in texts(source, 150)[part::2]]
            assert found == [t for t in in_files if _is_heldout(t) == (split == "heldout")]
    assert manifest.inputs == {"raw": inputs[1].digest, "tokenizer": inputs[2].digest}
    assert manifest.sources == read_manifest(inputs[1].path).sources
    assert manifest.counts().documents == 4 * 152
    assert result.summary["train_tokens"] == manifest.counts(split="train").tokens
    assert sorted(contents(result.path)) == sorted(["manifest.json", *(f.path for f in manifest.files)])


def _is_heldout(text: str) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) / 2**64 < 0.1


def test_shards_are_cut_at_their_limit(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    job = small_job(tmp_path, {"shards": {"unit_bytes": 10**9, "max_shard_bytes": 65536}})
    few = step.run(small_job(tmp_path / "few"), *inputs[1:])
    many = step.run(job, *inputs[1:])
    assert _tokens(few) == _tokens(many), "the unit's size does not change the tokens"


def _tokens(result: StageResult) -> dict[str, bytes]:
    return {name: data for name, data in contents(result.path).items() if name.endswith((".bin", ".idx"))}


def test_unchanged_shards_are_kept_and_damaged_ones_made_again(
    inputs: tuple[Path, StageResult, StageResult],
    tmp_path: Path,
    golden: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = small_job(tmp_path)
    result = step.run(job, *inputs[1:])
    assert contents(result.path) == golden
    path = Path(result.path) / "ko-train-00000.bin"
    stamp = path.stat().st_mtime_ns
    (Path(result.path) / "units").mkdir()  # as after a kill between manifest and tidying
    assert step.run(job, *inputs[1:]) == result
    assert "unchanged and verified" in capsys.readouterr().out and path.stat().st_mtime_ns == stamp
    assert not (Path(result.path) / "units").exists()
    path.write_bytes(bytes(path.stat().st_size))
    (Path(result.path) / "stale-train-00000.bin").touch()
    assert step.run(job, *inputs[1:]) == result and contents(result.path) == golden


def test_the_number_of_workers_changes_nothing(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes]
) -> None:
    job = small_job(tmp_path, {"shards": {"workers": 2}})
    assert contents(step.run(job, *inputs[1:]).path) == golden


def _forked(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=step.run, args=(job, raw, tokenizer))
    process.start()
    return process


def _killed_until_done(
    job: JobSpec, results: tuple[StageResult, StageResult], kills: int, seed: int
) -> dict[str, bytes]:
    """Start and kill -9 at random moments; finished work is thrown away as long as there are kills to spend."""
    rng = random.Random(seed)
    directory = Path(job.stage_dir("shards"))
    begun = time.monotonic()
    process = _forked(job, *results)
    process.join()
    whole = time.monotonic() - begun
    shutil.rmtree(directory)
    while kills:
        before = _journalled(directory)
        process = _forked(job, *results)
        process.join(rng.uniform(0, 0.4 * whole))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills -= 1
            if not (directory / "manifest.json").exists():
                assert _journalled(directory).items() >= before.items(), "a finished unit was done again"
        else:
            assert process.exitcode == 0
            shutil.rmtree(directory)
    process = _forked(job, *results)
    process.join()
    assert process.exitcode == 0
    return contents(directory)


def _journalled(directory: Path) -> dict[int, int]:
    """Inode of every unit in the journal: an inode that stays is a file that was not written again."""
    journal = directory / "units" / "journal.jsonl"
    if not journal.exists() or (directory / "manifest.json").exists():
        return {}
    lines = journal.read_text().split("\n")[1:-1]
    numbers = [json.loads(line)["unit"] for line in lines]
    return {n: units.unit_file(directory / "units", n).stat().st_ino for n in numbers}


@pytest.mark.parametrize("kills", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_nothing(
    inputs: tuple[Path, StageResult, StageResult],
    tmp_path: Path,
    golden: dict[str, bytes],
    kills: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert _killed_until_done(small_job(tmp_path), inputs[1:], kills, seed=kills) == golden


def test_workers_die_with_their_parent_and_the_rest_is_kept(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes]
) -> None:
    job = small_job(tmp_path, {"shards": {"workers": 2}})
    code = (
        "import sys\nfrom components.shards.step import run\nfrom manifests.spec import job_from_json\n"
        "from trainer.data.manifest import StageResult\n"
        "run(job_from_json(sys.argv[1]), *map(StageResult.from_json, sys.argv[2:]))\n"
    )
    command = [sys.executable, "-c", code, job.model_dump_json(), *(r.to_json() for r in inputs[1:])]
    directory = Path(job.stage_dir("shards"))
    kept: dict[int, int] = {}
    for _ in range(10):  # on a busy machine a run may end before it is seen working
        shutil.rmtree(directory, ignore_errors=True)
        process = subprocess.Popen(command, start_new_session=True)
        while len(_journalled(directory)) < 3 and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while _group_lives(process.pid):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.02)
        if kept := _journalled(directory):
            break
    assert len(kept) >= 3
    assert subprocess.run(command, check=False).returncode == 0
    assert contents(directory) == golden


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_journal_of_other_inputs_is_not_used(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes]
) -> None:
    job = small_job(tmp_path)
    directory = Path(job.stage_dir("shards")) / "units"
    directory.mkdir(parents=True)
    (directory / "000000.npz").write_bytes(b"other")
    record = {"unit": 0, "checksum": xxhash.xxh3_128_hexdigest(b"other")}
    (directory / "journal.jsonl").write_text(json.dumps({"inputs": "other"}) + "\n" + json.dumps(record) + "\n")
    assert contents(step.run(job, *inputs[1:]).path) == golden


def test_only_one_process_at_a_time(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    job = small_job(tmp_path)
    units = Path(job.stage_dir("shards")) / "units"
    with alone(units, "waiting"), pytest.raises(DataError, match="another process is making shards there"):
        step.run(job, *inputs[1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_one_clear_message_and_leaves_no_manifest(tmp_path: Path, workers: int) -> None:
    job = small_job(tmp_path, {"shards": {"workers": workers}})
    good = write_raw(job)
    tokenizer = tokenizer_step.run(job, good)
    path = Path(good.path) / "en" / "part-00001.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[40] = lines[40].replace(b'"text"', b'"body"')
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        step.run(job, good, tokenizer)
    assert str(caught.value) == f'{path}:41: no field "text"; mend or remove the line'
    assert not (Path(job.stage_dir("shards")) / "manifest.json").exists()


def test_a_full_volume_is_one_clear_message(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(tmp_path)
    monkeypatch.setattr(units, "_save", lambda *_: Path("/dev/full").write_bytes(bytes(10**5)))
    with pytest.raises(OSError, match=r"shards/\w+: the volume is full; make room and run again"):
        step.run(job, *inputs[1:])
    assert not (Path(job.stage_dir("shards")) / "manifest.json").exists()


def test_a_document_larger_than_a_shard_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    tokenizer = tokenizer_step.run(job, raw)
    encoder = units.UnitEncoder(raw.path, tokenizer.path, str(tmp_path), 0.1, max_document_bytes=64)
    with pytest.raises(DataError, match=r"part-00000\.jsonl:\d+: a document of \d+ tokens is larger than a shard"):
        encoder(units.Unit(0, "ko", "ko/part-00000.jsonl", 0, 10**6))
