"""A limit on the size of files (`ulimit -f`) is reported in one line with its remedy, for every file of a step."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from raw_cases import small_job, write_raw

from components.download import step as download
from components.hygiene import step as hygiene
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from manifests.spec import JobSpec
from trainer.data.manifest import read_manifest, verify
from trainer.errors import VolumeError

# Output is captured in memory, because pytest's capture file would reach the limit.
pytestmark = pytest.mark.usefixtures("capsys")
SAID = (
    "a file would be larger than this process or the volume allows; raise the limit (ulimit -f) and run again, "
    "finished work is kept"
)


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _refused(call: Callable[[], object], limit: int) -> str:
    with pytest.raises(VolumeError) as caught, _file_size_limit(limit):
        call()
    return str(caught.value)


@pytest.mark.parametrize("limit", [100, 3000])
def test_download(make_job: Callable[..., JobSpec], tmp_path: Path, limit: int) -> None:
    lines = [json.dumps({"text": f"Text {n}."}) + "\n" for n in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    job = make_job({"web": {"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}}, tmp_path / "data")
    where = Path(job.stage_dir("raw")) / "web"
    assert _refused(lambda: download.run(job), limit) == f"source 'web': {where}: {SAID}"
    assert download.run(job).summary["documents"] == 1000


@pytest.mark.parametrize(("limit", "workers"), [(100, 1), (1000, 1), (3000, 1), (1000, 2)])
def test_hygiene_tokenizer_and_shards(tmp_path: Path, limit: int, workers: int) -> None:
    job = small_job(tmp_path, {"hygiene": {"exact_duplicates": True}, "shards": {"workers": workers}})
    raw = write_raw(job)
    assert _refused(lambda: hygiene.run(job, raw), limit) == f"{job.stage_dir('hygiene')}: {SAID}"
    hygiene.run(job, raw)
    assert _refused(lambda: tokenizer.run(job, raw), limit) == f"{job.stage_dir('tokenizers')}: {SAID}"
    trained = tokenizer.run(job, raw)
    assert _refused(lambda: shards.run(job, raw, trained), limit) == f"{job.stage_dir('shards')}: {SAID}"
    made = read_manifest(shards.run(job, raw, trained).path, "shards")
    verify(job.stage_dir("shards"), made)
