"""metrics.jsonl and TensorBoard on a disk that is temporarily full, simulated by a limit on file sizes."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.recording.logs import MetricsFile
from trainer.recording.trackers.board import Board


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_lines_wait_in_memory_until_the_disk_takes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = MetricsFile(tmp_path, 0)
    file.write({"step": 1, "loss": 3.0})
    size = file.path.stat().st_size
    with full_disk(size + 7), caplog.at_level(logging.WARNING, logger="trainer"):
        file.write({"step": 2, "loss": 2.0})
        assert file.path.stat().st_size == size + 7, "the disk has taken the beginning of the line"
        file.write({"step": 3, "loss": 1.0})
        file.sync()
    assert len(caplog.records) == 1 and "metrics.jsonl cannot be written" in caplog.text
    assert [record["step"] for record in file.records()] == [1, 2, 3], "what waits counts"
    file.sync()
    lines = file.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    file.write({"step": 4, "loss": float("nan")})
    file.close()
    assert json.loads(file.path.read_text().splitlines()[3]) == {"step": 4, "loss": None}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_points_wait_in_memory_until_the_disk_takes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    board = Board(tmp_path, 0)
    board.add(1, {"train/loss": 1.0})
    board.flush()
    (file,) = (tmp_path / "tb").iterdir()
    with full_disk(file.stat().st_size + 20), caplog.at_level(logging.WARNING, logger="trainer"):
        for step in (2, 3):
            board.add(step, {"train/loss": float(step)})
            board.flush()
    assert len(caplog.records) == 1 and "tb cannot be written" in caplog.text
    board.add(4, {"train/loss": 4.0})
    board.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(n, n) for n in (1, 2, 3, 4)]
