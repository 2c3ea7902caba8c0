"""`yaongi data`: damage is reported, totals match the files, a row is shown with its boundaries and origins."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.download import step as download
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from manifests.spec import JobSpec
from pipelines.data import app
from pipelines.run import local_job
from trainer.data.loader import TokenLoader
from trainer.data.manifest import DataError, read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.errors import VolumeError
from trainer.exitcodes import ExitCode
from trainer.specbase import changes_from_sets

SETS = ["data.max_bytes_per_source=40000", "train.steps=8", "train.packing=best_fit"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def job(workdir: Path) -> JobSpec:
    changes = {"data": {"max_bytes_per_source": 40000}, "train": {"steps": 8, "packing": "best_fit"}}
    spec, _ = local_job("tiny", changes, target="local", workdir=workdir)
    raw = download.run(spec)
    shards.run(spec, raw, tokenizer.run(spec, raw))
    return spec


def call(*arguments: str, workdir: Path) -> str:
    sets = [word for change in SETS for word in ("--set", change)]
    result = CliRunner().invoke(app, [*arguments, *sets, "--workdir", str(workdir)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_verify_says_that_all_is_whole(job: JobSpec, workdir: Path) -> None:
    lines = call("verify", "tiny", workdir=workdir).splitlines()
    assert [re.sub(r":.*: ", ": ", line.split(" (")[0]) for line in lines if "digest" in line] == [
        "raw: whole",
        "tokenizer: whole",
        "shards: whole",
    ]


def test_verify_names_every_damaged_file(job: JobSpec, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job.stage_dir("shards"), tmp_path / "shards"))
    flipped, cut = copy / "ko-train-00000.bin", copy / "en-train-00000.idx"
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-3])
    result = CliRunner().invoke(app, ["verify", str(copy)])
    assert isinstance(result.exception, DataError) and str(result.exception).startswith("2 damaged: ")
    assert f"damaged: {flipped}: its content differs" in result.output
    assert f"damaged: {cut}: has " in result.output


def test_a_file_that_the_volume_does_not_give_is_no_bad_data(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, algorithm: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("trainer.data.manifest.checksum", fail)
    error = CliRunner().invoke(app, ["verify", job.stage_dir("tokenizers")]).exception
    assert isinstance(error, VolumeError) and error.code == ExitCode.VOLUME


def test_verify_names_damage_of_one_stage_where_a_later_one_is_missing(job: JobSpec, tmp_path: Path) -> None:
    spec, _ = local_job("tiny", changes_from_sets(SETS), target="local", workdir=tmp_path)
    raw = Path(shutil.copytree(job.stage_dir("raw"), spec.stage_dir("raw")))
    flipped = raw / "ko" / "part-00000.jsonl"
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    sets = [word for change in SETS for word in ("--set", change)]
    result = CliRunner().invoke(app, ["verify", "tiny", *sets, "--workdir", str(tmp_path)])
    assert f"damaged: {flipped}: its content differs" in result.output
    assert isinstance(result.exception, DataError) and "manifest.json: not there" in str(result.exception)


def test_stats_are_the_counts_of_the_manifest_with_a_picture(job: JobSpec, workdir: Path, tmp_path: Path) -> None:
    output = call("stats", "tiny", "--plot", str(tmp_path / "tokens.png"), workdir=workdir)
    assert re.search(r"distinct-1 +distinct-2 +distinct-3", output) and re.search(r"\n *ko +0\.\d{3} +0\.\d{3}", output)
    manifest = read_manifest(job.stage_dir("shards"))
    lines = {line.split()[0]: line for line in reversed(output.splitlines()) if line.strip()}
    for source, spec in job.data.sources.items():
        tokens, heldout = (manifest.counts(source, split).tokens for split in ("train", "heldout"))
        wanted = [f"({spec.domain})", spec.licence, f"{manifest.counts(source).documents:,}", f"{tokens:,}"]
        assert all(word in lines[source] for word in [*wanted, f"{heldout:,}"])
    assert f"{manifest.counts(split='train').tokens:,}" in lines["all"]
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_cat_prints_the_document_and_the_line_that_it_was(job: JobSpec, workdir: Path) -> None:
    output = call("cat", "tiny", "--source", "ko", "--first", "3", workdir=workdir)
    head, text = output.split("\n", 1)
    path, offset = re.search(r"← (\S+) at byte ([\d,]+)", head).groups()
    with open(Path(job.stage_dir("raw")) / path, "rb") as file:
        file.seek(int(offset.replace(",", "")))
        original = json.loads(file.readline())["text"]
    assert text.strip() == (original + "<|endoftext|>").strip()


def test_a_missing_source_and_document_are_refused(job: JobSpec, workdir: Path) -> None:
    with pytest.raises(DataError, match="has no source 'jp'; it has code, en, ko, math"):
        call("cat", "tiny", "--source", "jp", workdir=workdir)
    with pytest.raises(DataError, match="there is no number 99999"):
        call("cat", "tiny", "--source", "ko", "--first", "99999", workdir=workdir)
    with pytest.raises(DataError, match=r"^the step has 16 rows of 256 tokens, counted from 0; there is no row 99$"):
        call("peek", "tiny", "--row", "99", workdir=workdir)
    with pytest.raises(ValueError, match=r"^the job has 8 steps; there is no step 9$"):
        call("peek", "tiny", "--step", "9", workdir=workdir)


def test_peek_shows_what_the_trainer_reads(job: JobSpec, workdir: Path) -> None:
    train = job.train_spec()
    with TokenLoader(train.tokens, train.batch, rank=0, world_size=1) as loader:
        step = [next(loader) for _ in range(3)][-1]
    ids = step.micro_batches[0].ids_BT[5].tolist()
    text = Tokenizer.load(job.stage_dir("tokenizers"))
    starts = step.micro_batches[0].seq_idx_BT[5].tolist()
    pieces = [[i for i, s in zip(ids, starts, strict=True) if s == n] for n in range(starts[-1] + 1)]
    output = call("peek", "tiny", "--step", "3", "--row", "5", workdir=workdir)
    assert output.startswith(f"step 3, row 5: {len(ids)} tokens of {len(pieces)} documents")
    shown = re.split(r"^── .*\n", output, flags=re.MULTILINE)[1:]
    assert [piece.rstrip("\n") for piece in shown] == [text.decode(piece).rstrip("\n") for piece in pieces]
