"""A folder of an earlier version works with this one: its data verifies, its run is found, nothing is repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import former
import pytest

from components.download import step as download
from components.hygiene import step as hygiene
from components.launch.artefacts import finished
from components.launch.step import run as launch
from components.launch.step import write_specs
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from manifests.spec import load_job
from trainer.errors import LaunchError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return former.unpack(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "journal.json"
    }


def test_every_step_finds_its_work_done(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    job = load_job(str(run / "job.yaml"))
    assert job.run_dir == str(run)
    before = contents(tmp_path / "work" / "datasets")
    raw = hygiene.run(job, download.run(job))
    trained = tokenizer.run(job, raw)
    tokens = shards.run(job, raw, trained)
    assert contents(tmp_path / "work" / "datasets") == before
    assert tokens.summary["train_documents"] == 181
    write_specs(job)
    for task in ("train", "evaluate", "export"):
        assert finished(job, task) is not None, task
    # As where several pods made the token files: the training follows the tokenizer that they were made with.
    assert launch(job, "train", trained).kind == "train"
    with pytest.raises(LaunchError, match="changed since the step before made it"):
        launch(job, "train", trained.model_copy(update={"digest": "0" * 64}))


def test_commands_read_it(run: Path, yaongi: Callable[..., tuple[int, str, str]], tmp_path: Path):
    job = str(run / "job.yaml")
    code, said, _ = yaongi("data", "verify", job)
    assert code == 0 and said.count(": whole") == 4
    code, said, _ = yaongi("status", former.RUN)
    assert code == 0 and "8" in said
    code, said, _ = yaongi("data", "peek", job, "--step", "6")
    assert code == 0 and "texts/en.jsonl" not in said
    code, said, _ = yaongi("generate", former.RUN, "--prompt", "the river", "--tokens", "4")
    assert code == 0 and said.startswith("the river")
