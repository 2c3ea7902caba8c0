"""The shards step: its contents against the raw text; the same bytes after kills and with any number of workers."""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import xxhash
from raw_cases import contents, small_job, texts, write_raw

from components.shards import step, units
from components.shards.ranges import ranges
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec
from trainer.data.documents import SourceDocuments
from trainer.data.format import Shard
from trainer.data.manifest import DataError, StageResult, read_manifest
from trainer.data.provenance import Origins
from trainer.data.scores import compression
from trainer.data.tokenizer import Tokenizer
from trainer.errors import LaunchError, VolumeError


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
                if not entry.path.endswith(".bin"):
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


def test_scores_are_those_of_the_texts_and_only_where_an_order_needs_them(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path
) -> None:
    plain = small_job(tmp_path)
    by_length = plain.updated({"data": {"sources": {"ko": {"order": {"by": "length"}}}}})
    job = plain.updated({"data": {"sources": {"ko": {"order": {"by": "compression"}}}}})
    assert plain.keys == by_length.keys and plain.run_name != by_length.run_name != job.run_name
    assert {stage for stage, key in job.keys.items() if key != plain.keys[stage]} == {"shards"}
    result = step.run(job, *inputs[1:])
    manifest = read_manifest(result.path, "shards")
    assert {entry.source for entry in manifest.files if entry.path.endswith(".scores")} == {"ko"}
    tokenizer = Tokenizer.load(inputs[2].path)
    documents = SourceDocuments(Path(result.path), manifest, "ko", "train")
    expected = [
        compression(tokenizer.decode(documents.tokens(n)[:-1].tolist()).encode()) for n in range(len(documents.lengths))
    ]
    assert documents.scores().tolist() == pytest.approx(expected, rel=1e-6) and len(set(expected)) > 10


def test_says_where_each_document_came_from(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    result = step.run(small_job(tmp_path), *inputs[1:])
    manifest, tokenizer = read_manifest(result.path, "shards"), Tokenizer.load(inputs[2].path)
    seen = 0
    for entry in manifest.files:
        if entry.path.endswith(".bin"):
            prefix = Path(result.path) / entry.path.removesuffix(".bin")
            shard, origins = Shard(prefix), Origins(prefix, entry.documents)
            for n in range(len(shard)):
                raw_file = Path(inputs[1].path) / origins[n].path
                line = raw_file.read_bytes()[origins[n].offset :].split(b"\n", 1)[0]
                assert json.loads(line)["text"] == tokenizer.decode(shard.document(n)[:-1])
                seen += 1
    assert seen == manifest.counts().documents == 4 * 152


@pytest.mark.parametrize("engine", ["tiktoken", "tokenizers"])
def test_the_engine_changes_no_byte(
    inputs: tuple[Path, StageResult, StageResult],
    tmp_path: Path,
    golden: dict[str, bytes],
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "choose_engine", lambda *_: (engine, "the test wants it"))
    assert contents(step.run(small_job(tmp_path), *inputs[1:]).path) == golden


def test_shards_are_cut_at_their_limit(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    job = small_job(tmp_path, {"shards": {"unit_bytes": 10**9, "max_shard_bytes": 65536}})
    few = step.run(small_job(tmp_path / "few"), *inputs[1:])
    many = step.run(job, *inputs[1:])
    assert _files(few) == _files(many), "the unit's size does not change the files"


def _files(result: StageResult) -> dict[str, bytes]:
    return {name: data for name, data in contents(result.path).items() if name != "manifest.json"}


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
    (Path(result.path) / "somebody's.tmp").mkdir()
    assert step.run(job, *inputs[1:]) == result and contents(result.path) == golden


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.proof])])
def test_the_number_of_workers_changes_nothing(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes], workers: int
) -> None:
    job = small_job(tmp_path, {"shards": {"workers": workers}})
    assert contents(step.run(job, *inputs[1:]).path) == golden


def _forked(job: JobSpec, raw: StageResult, tokenizer: StageResult) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=step.run, args=(job, raw, tokenizer))
    process.start()
    return process


def _killed_until_done(
    job: JobSpec, results: tuple[StageResult, StageResult], kills: int, seed: int
) -> dict[str, bytes]:
    """Start and kill -9 at random moments; finished work is deleted while kills remain."""
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
    """Inode of every unit in the journal: if it is unchanged, the file was not written again."""
    journals = sorted((directory / "units").glob("journal*.jsonl"))
    if not journals or (directory / "manifest.json").exists():
        return {}
    lines = [line for journal in journals for line in journal.read_text().split("\n")[1:-1]]
    numbers = [json.loads(line)["unit"] for line in lines]
    return {n: units.unit_file(directory / "units", n).stat().st_ino for n in numbers}


@pytest.mark.parametrize("kills", [20, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.proof])])
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
    for _ in range(10):  # on a busy machine a run may end before its work is noticed
        shutil.rmtree(directory, ignore_errors=True)
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None:
            with suppress(FileNotFoundError):  # it is just ending and cleans up
                if len(_journalled(directory)) >= 3:
                    break
            time.sleep(0.001)
        process.kill()
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
    (directory / "journal-000000-000000.jsonl").write_text(
        json.dumps({"inputs": "other"}) + "\n" + json.dumps(record) + "\n"
    )
    assert contents(step.run(job, *inputs[1:]).path) == golden


@pytest.mark.parametrize("damage", [b'{"unit": 0, "checksun": "0"}', b"5", b'{"unit": 0, "checksum": "\xff"}', b"[]"])
def test_a_damaged_line_of_a_journal_costs_a_unit_and_no_more(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes], damage: bytes
) -> None:
    job = small_job(tmp_path)
    step.encode_range(_range(job, inputs, 0, 1))
    (journal,) = (Path(job.stage_dir("shards")) / "units").glob("journal*.jsonl")
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]) + b"\n")
    assert contents(step.run(job, *inputs[1:]).path) == golden


def test_a_damaged_tokenizer_is_refused_and_named(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path
) -> None:
    job, (_, raw, tokenizer) = small_job(tmp_path), inputs
    copy = shutil.copytree(tokenizer.path, tmp_path / "copy")
    data = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(data.replace(b"im_start", b"im_stark"))
    with pytest.raises(DataError, match=r"tokenizer\.json: its content differs from the manifest's sha256"):
        step.run(job, raw, tokenizer.model_copy(update={"path": str(copy)}))


def test_only_one_process_at_a_time(inputs: tuple[Path, StageResult, StageResult], tmp_path: Path) -> None:
    job = small_job(tmp_path)
    with _held(job, 0, 10**6), pytest.raises(LaunchError, match="another process is making shards there"):
        step.run(job, *inputs[1:])


def test_ranges_of_units_are_made_side_by_side_and_none_twice(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, golden: dict[str, bytes]
) -> None:
    job = small_job(tmp_path)
    units_of_all = units.plan_units(read_manifest(inputs[1].path), job.shards.unit_bytes)
    first = len(units.range_of(units_of_all, 0, 3))
    with _held(job, 0, first):  # range 0 is being made elsewhere
        step.encode_range(_range(job, inputs, 1, 3))
        with pytest.raises(LaunchError, match="another process is making shards there"):
            step.encode_range(_range(job, inputs, 0, 2))
    made = _journalled(Path(job.stage_dir("shards")))
    assert sorted(made) == [unit.number for unit in units.range_of(units_of_all, 1, 3)]
    step.encode_range(_range(job, inputs, 1, 2))  # a different split: finished work is kept
    step.encode_range(_range(job, inputs, 0, 1))
    assert _journalled(Path(job.stage_dir("shards"))).items() > made.items()
    assert contents(step.run(job, *inputs[1:]).path) == golden
    step.encode_range(_range(job, inputs, 0, 2))
    assert contents(job.stage_dir("shards")) == golden, "a range that finds finished shards leaves them alone"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_ranges_hold_each_unit_once_in_nearly_equal_parts(count: int) -> None:
    sizes = [random.Random(n).choice([1, 1000, 1000, 1000, 700]) for n in range(100)]
    all_units = [units.Unit(n, "ko", "a", 0, size) for n, size in enumerate(sizes)]
    parts = [list(units.range_of(all_units, index, count)) for index in range(count)]
    assert [unit for part in parts for unit in part] == all_units
    for part in parts:
        assert abs(sum(unit.stop for unit in part) - sum(sizes) / count) <= 1000


def _range(job: JobSpec, inputs: tuple[Path, StageResult, StageResult], index: int, count: int) -> step.Range:
    return ranges(job.updated({"shards": {"pods": count}}), *inputs[1:])[index]


@contextmanager
def _held(job: JobSpec, first: int, last: int) -> Iterator[None]:
    """Another process holds units [first, last)."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom components.lock import alone_on\n"
        "first, last = map(int, sys.argv[2:])\n"
        "with alone_on(Path(sys.argv[1]) / 'units', 'waiting', first, last - first):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, job.stage_dir("shards"), str(first), str(last)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.communicate("")


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
    assert str(caught.value) == f'{path}:41: no field "text"; fix or remove the line'
    assert not (Path(job.stage_dir("shards")) / "manifest.json").exists()


def test_a_full_volume_is_one_clear_message(
    inputs: tuple[Path, StageResult, StageResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(tmp_path)
    monkeypatch.setattr(units, "_save", lambda *_: Path("/dev/full").write_bytes(bytes(10**5)))
    with pytest.raises(VolumeError, match=r"shards/\w+: the volume is full; make room and run again"):
        step.run(job, *inputs[1:])
    assert not (Path(job.stage_dir("shards")) / "manifest.json").exists()


def test_a_raw_file_that_cannot_be_read_is_named_and_the_rest_kept(
    inputs: tuple[Path, StageResult, StageResult],
    tmp_path: Path,
    golden: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, read = small_job(tmp_path), units.objects

    def refuse(path: Path, *bounds: int) -> Iterator[tuple[int, dict[str, object]]]:
        if "math" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *bounds)

    with monkeypatch.context() as patched:
        patched.setattr(units, "objects", refuse)
        with pytest.raises(VolumeError, match=r"math/part-00000\.jsonl: permission denied; fix its permissions"):
            step.run(job, *inputs[1:])
    done = _journalled(Path(job.stage_dir("shards")))
    assert done
    step.encode_range(_range(job, inputs, 0, 1))
    assert _journalled(Path(job.stage_dir("shards"))).items() > done.items()
    assert contents(step.run(job, *inputs[1:]).path) == golden


def test_a_document_larger_than_a_shard_is_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    tokenizer = tokenizer_step.run(job, raw)
    encoder = units.UnitEncoder(raw.path, None, frozenset(), tokenizer.path, str(tmp_path), 0.1, 64, "tokenizers")
    with pytest.raises(DataError, match=r"part-00000\.jsonl:\d+: a document of \d+ tokens is larger than a shard"):
        encoder(units.Unit(0, "ko", "ko/part-00000.jsonl", 0, 10**6))
