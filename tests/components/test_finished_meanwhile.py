"""What another process finishes between a step's first check and its lock is used, not made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from raw_cases import small_job, write_raw

from components.shards import step as shards
from components.shards.ranges import ranges
from components.tokenizer import step as tokenizer
from trainer.data.manifest import StageResult


def _inodes(directory: str) -> dict[str, int]:
    """Inodes of the finished files: if one is unchanged, the file was not written again."""
    return {path.name: path.stat().st_ino for path in Path(directory).iterdir() if path.is_file()}


class Other:
    """Another process, which runs a step from start to end just before this one gets the lock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, lock: str) -> None:
        self.made: dict[str, int] = {}
        self.result: StageResult | None = None
        self._step: Callable[[], StageResult] | None = None
        self._lock: Callable[..., AbstractContextManager[None]] = getattr(module, lock)
        monkeypatch.setattr(module, lock, self._taken)

    def runs(self, step: Callable[[], StageResult]) -> None:
        self._step, self.result = step, None

    def _taken(self, *arguments: Any) -> AbstractContextManager[None]:
        if (step := self._step) is not None:
            self._step = None  # the other one takes the lock as well
            self.result = step()
            self.made = _inodes(self.result.path)
            print("-- this process --")
        return self._lock(*arguments)


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.split("-- this process --\n")[1]


def test_a_tokenizer_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    other = Other(monkeypatch, tokenizer, "alone")
    other.runs(lambda: tokenizer.run(job, raw))
    result = tokenizer.run(job, raw)
    assert result == other.result and _inodes(result.path) == other.made
    assert _said(capsys) == f"tokenizer: unchanged and verified: {result.path}\n"


def test_shards_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = small_job(tmp_path)
    raw = write_raw(job)
    trained = tokenizer.run(job, raw)
    other = Other(monkeypatch, shards, "alone_on")
    other.runs(lambda: shards.run(job, raw, trained))
    result = shards.run(job, raw, trained)
    assert result == other.result and _inodes(result.path) == other.made
    assert _said(capsys) == f"shards: unchanged and verified: {result.path}\n"


def test_a_range_of_units_of_finished_shards_is_not_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = small_job(tmp_path, {"shards": {"pods": 2}})
    raw = write_raw(job)
    trained = tokenizer.run(job, raw)
    other = Other(monkeypatch, shards, "alone_on")
    other.runs(lambda: shards.run(job, raw, trained))
    shards.encode_range(ranges(job, raw, trained)[0])
    assert other.result is not None and _inodes(other.result.path) == other.made
    units = Path(job.stage_dir("shards")) / shards.UNITS_DIR
    assert not list(units.glob("*.npz")) and not list(units.glob("journal*"))
    assert not _said(capsys)
