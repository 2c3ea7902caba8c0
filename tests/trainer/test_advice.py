"""Advice from recorded numbers: in the log, in `status` and in the report."""

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

import micro
import pytest
import torch
from made_run import write_metrics
from rich.console import Console

from pipelines.runs import standing
from pipelines.runs.view import View, details
from trainer.distributed import World
from trainer.recording.advice import MARK, advice
from trainer.recording.recorder import Recorder, StepRecord
from trainer.report import write_report
from trainer.spec import BackendsSpec

SAID = (
    "clipped in 93% of the last 500 steps (median gradient norm 3, clip_norm 1): lower "
    "train.optimizer.muon.learning_rate or raise train.optimizer.clip_norm"
)
LENGTH = {"steps": 1000, "schedule": {"warmup_fraction": 0.1}}


def lines(steps: int, clipped: int, out_of: int = 100) -> list[dict]:
    return [
        {"step": n, "clipped": n % out_of < clipped, "skipped": None, "grad_norm": 3.0 if n % out_of < clipped else 0.5}
        for n in range(1, steps + 1)
    ]


@pytest.fixture
def spec(micro_data: Path, tmp_path: Path):
    made = micro.micro_spec(micro_data, tmp_path / "run", **LENGTH, runtime={"metrics_port": 0})
    micro.write_spec(made, tmp_path / "run" / "train.yaml")
    return made


def test_most_steps_clipped(spec):
    assert advice(lines(800, 93), spec) == [SAID]
    by_adamw = spec.updated({"optimizer": {"name": "adamw"}})
    assert "train.optimizer.adamw.learning_rate" in advice(lines(800, 93), by_adamw)[0]


@pytest.mark.parametrize(
    ("records", "changes"),
    [
        (lines(800, 49), {}),
        (lines(199, 100), {}),  # 99 steps after the warm-up
        (lines(800, 100), {"optimizer": {"clip_norm": None}}),
        ([line | {"skipped": "spike"} for line in lines(800, 100)], {}),
        ([{"step": n} for n in range(1, 800)], {}),  # another engine's lines
    ],
)
def test_no_advice(spec, records: list[dict], changes: dict):
    assert advice(records, spec.updated(changes)) == []


def test_status_and_report_show_it(spec, tmp_path: Path):
    write_metrics(spec, 800)
    file = tmp_path / "run" / "logs" / "metrics.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(a | b) + "\n" for a, b in zip(written, lines(800, 93), strict=True)))
    numbers = standing.of_directory(tmp_path / "run")
    assert numbers.advice == (SAID,)
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(details(View("a", "here", "running", standing=numbers)))
    assert f"advice      {SAID}" in console.export_text()
    assert SAID in write_report(tmp_path / "run").read_text()


def test_the_log_says_it_where_there_are_no_files(spec, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "trainer")
    recorder = Recorder(spec, World(0, 1, 0, 1, torch.device("cpu"), None, None), time.time())
    recorder.begin(None, dict.fromkeys(("device", "mesh", "precision", *BackendsSpec.model_fields), "x"))
    for line in lines(500, 93):
        record = StepRecord(
            line["step"], 2.5, {}, line["grad_norm"], 1e-3, 96, 64.0, 1.0, line["clipped"], None, 1.0, 0, {}
        )
        recorder.step(record, {}, 16)
    recorder.close()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith(MARK)]
    assert len(said) == 1 and "of the last 400 steps" in said[0]
    stamped = f"2026-01-01T00:00:00Z {said[0]}"
    assert standing.of_log([stamped], datetime.now(UTC)).advice == (said[0].removeprefix(MARK),)
