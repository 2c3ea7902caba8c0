"""The progress of a run, from the files of its run directory or from the log lines of rank 0.

The trainer writes both anyway (`trainer.recording.recorder`): metrics.jsonl has a line per step; the log has a line
every `log_every_steps` steps and is all that a machine without the volume can read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import (
    LATEST,
    MEGATRON_FOLDER,
    MEGATRON_TRACKER,
    latest_step,
    megatron_step,
    newest_until,
    step_of,
)
from trainer.process import restarts
from trainer.recording.advice import MARK, advice
from trainer.recording.logs import VALIDATIONS
from trainer.recording.results import headline_loss
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml

TAIL_BYTES = 2**19  # of metrics.jsonl: about as many steps as advice looks at
RATE_STEPS = 20
PROGRESS = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)  loss (?P<loss>\S+) .* (?P<rate>[\d,]+) tokens/s  ETA (?P<left>.+?)(?:  |$)"
)
PUBLISHED = re.compile(r"checkpoint of step (\d+) published")
# Of the step that launches the training if it was done before, and of the one that cleans up.
DONE_BEFORE = re.compile(r"train: unchanged and verified, nothing to do \(step (?P<step>\d+), loss (?P<loss>\S+)\)")


@dataclass(frozen=True)
class Standing:
    """Numbers of a run; None where nothing is known yet.

    Attributes:
        loss, loss_steps: mean loss in nats per token, and the number of last steps it is over.
        left: time until the last step at the current speed.
        checkpoint_step, checkpoint_age: step and age in seconds of the newest checkpoint.
        advice: what the numbers suggest to change.
    """

    step: int = 0
    steps: int | None = None
    loss: float | None = None
    loss_steps: int = 1
    tokens_per_second: float | None = None
    left: timedelta | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    restarts: int = 0
    advice: tuple[str, ...] = ()

    @property
    def progress(self) -> str:
        return f"{self.step:,}/{self.steps:,}" if self.steps else "–"

    @property
    def checkpoint(self) -> str:
        if self.checkpoint_step is None:
            return "none yet" if self.steps else "–"
        age = "" if self.checkpoint_age is None else f", {timedelta(seconds=round(self.checkpoint_age))} old"
        return f"step {self.checkpoint_step:,}{age}"


def of_directory(run_dir: Path) -> Standing:
    """Read the run directory's files; all zero before training has begun."""
    spec_file = run_dir / "train.yaml"
    if not spec_file.is_file():
        return Standing()
    spec = parse(TrainSpec, read_yaml(spec_file), str(spec_file))
    records = _last_records(run_dir / "logs" / "metrics.jsonl")
    saved, marker = latest_step(run_dir), run_dir / "checkpoints" / LATEST
    if spec.engine == "megatron" and (theirs := megatron_step(run_dir)) > saved:
        saved, marker = theirs, run_dir / MEGATRON_FOLDER / MEGATRON_TRACKER
    if records and saved > records[-1]["step"]:
        # The run was made longer and went back: this checkpoint is of the abandoned part, and no new one exists yet.
        before = newest_until(run_dir, records[-1]["step"])
        saved, marker = (step_of(before), before) if before else (0, marker)
    common: dict[str, Any] = {
        "steps": spec.steps,
        "checkpoint_step": saved or None,
        "checkpoint_age": time.time() - marker.stat().st_mtime if saved else None,
        "restarts": restarts.count(run_dir),
    }
    if not records:
        return Standing(step=saved, **common)
    last, recent = records[-1], records[-RATE_STEPS:]
    loss, loss_steps = headline_loss(records)
    seconds = sum(record["seconds"] for record in recent) / len(recent)
    return Standing(
        step=last["step"],
        loss=loss,
        loss_steps=loss_steps,
        tokens_per_second=sum(record["tokens_per_second"] for record in recent) / len(recent),
        left=timedelta(seconds=round((spec.steps - last["step"]) * seconds)),
        advice=tuple(advice(records, spec, _last_records(run_dir / VALIDATIONS))),
        **common,
    )


def of_log(lines: Iterable[str], now: datetime) -> Standing:
    """Read the lines of rank 0's log, each with the kubelet's timestamp in front."""
    return _of_lines((line.partition(" ")[::2] for line in lines), now)


def of_lines(lines: Iterable[str]) -> Standing:
    """Read lines of rank 0's log without timestamps, as the step that launches the training repeats them."""
    return _of_lines((("", line) for line in lines), datetime.now(UTC))


def _of_lines(lines: Iterable[tuple[str, str]], now: datetime) -> Standing:
    found: dict[str, Any] = {}
    for stamp, text in lines:
        if match := PROGRESS.match(text):
            found |= {"step": int(match["step"]), "steps": int(match["steps"]), "loss": float(match["loss"])}
            found |= {"tokens_per_second": float(match["rate"].replace(",", "")), "left": _duration(match["left"])}
        elif match := PUBLISHED.match(text):
            age = (now - datetime.fromisoformat(stamp)).total_seconds() if stamp else None
            found |= {"checkpoint_step": int(match[1]), "checkpoint_age": age}
        elif text.startswith(MARK):
            said = text.removeprefix(MARK)  # the newest of each kind
            found["advice"] = (*(one for one in found.get("advice", ()) if one.split()[0] != said.split()[0]), said)
        elif match := DONE_BEFORE.match(text):
            step = int(match["step"])
            found |= {"step": step, "steps": step, "loss": float(match["loss"]), "checkpoint_step": step}
    return Standing(**found)


def _duration(text: str) -> timedelta:
    """Parse the format of `str(timedelta)`: [N day[s], ]H:MM:SS."""
    days, _, clock = text.rpartition(", ")
    hours, minutes, seconds = map(int, clock.split(":"))
    return timedelta(days=int(days.split()[0]) if days else 0, hours=hours, minutes=minutes, seconds=seconds)


def _last_records(file: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl; a process may be writing the very last one."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
