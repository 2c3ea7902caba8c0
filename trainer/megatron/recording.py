"""From what Megatron-LM prints to the run's records, under the same names as those of our own engine."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from trainer.checkpoints.checkpoint import MEGATRON_FOLDER, MEGATRON_TRACKER, megatron_step
from trainer.distributed import World
from trainer.megatron.blend import trained
from trainer.megatron.log import Event, Saved, Step, Validated
from trainer.process.watchdog import Watchdog
from trainer.recording.logs import METRICS
from trainer.recording.recorder import Recorder, Resumed, StepRecord
from trainer.spec import MAX_SKIPPED_STEPS, TrainSpec

log = logging.getLogger(__name__)

BALANCE = "load_balancing_loss"  # Megatron's name of what is router_balance here


class Recording:
    """Of one rank; `take` gets the events of the relay, in its thread.

    Args:
        available: training tokens of each source.

    Attributes:
        diverged: why the training has been told to stop; "" if it has not.
    """

    def __init__(
        self, spec: TrainSpec, world: World, recorder: Recorder, watchdog: Watchdog, available: dict[str, int]
    ) -> None:
        self._spec, self._world, self._recorder, self._watchdog = spec, world, recorder, watchdog
        self._available = available
        self._skipped = 0
        self._stepped = time.monotonic()
        self.step = megatron_step(spec.run_dir)
        self.diverged = ""

    def begin(self, build_info: dict[str, str]) -> None:
        """Open the run's files after the checkpoint that Megatron resumes from."""
        tracker = Path(self._spec.run_dir) / MEGATRON_FOLDER / MEGATRON_TRACKER
        saved = tracker.stat().st_mtime if self.step else time.time()
        where = Resumed(self.step, _seconds_until(self._spec, self.step), trained(self._spec, self.step), saved)
        self._recorder.begin_at(where, build_info)
        if self.step:
            log.info("resuming from Megatron's checkpoint of step %d", self.step)

    def take(self, event: Event) -> None:
        if isinstance(event, Step):
            self._take_step(event)
        elif isinstance(event, Saved):
            self._take_saved(event)
        elif isinstance(event, Validated):
            log.info("validation after step %d: loss %.4f of held-out rows", event.step, event.loss)
        self._watchdog.beat()

    def doing(self) -> str:
        """For the watchdog."""
        return f"step {self.step + 1}"

    def _take_step(self, event: Step) -> None:
        if event.step <= self.step:
            return
        spec, tokens = self._spec, event.step * self._spec.batch.tokens_per_step
        self.step, self._stepped = event.step, time.monotonic()
        by_source = trained(spec, event.step)
        clip, moe = spec.optimizer.clip_norm, spec.model.moe
        # Megatron prints a mean over the layers without weight; ours, and what both train on, is the weighted sum.
        weight = (moe.balance_loss_weight or moe.sequence_loss_weight) if moe else 0.0
        weight *= sum("E" in layer for layer in spec.model.layers)
        record = StepRecord(
            step=event.step,
            loss=event.loss,
            auxiliary={
                "router_balance" if name == BALANCE else name.replace(" ", "_"): value * weight
                if name == BALANCE
                else value
                for name, value in event.others.items()
            },
            grad_norm=event.grad_norm,
            learning_rate=event.learning_rate,
            tokens=tokens,
            tokens_per_second=spec.batch.tokens_per_step / event.seconds,
            seconds=event.seconds,
            clipped=clip is not None and event.grad_norm > clip,
            skipped="nonfinite" if event.skipped else None,
            expert_load_max_ratio=None,
            expert_starved_ratio=None,
            by_source=by_source,
        )
        self._recorder.spent("forward_backward", event.seconds)
        self._recorder.step_seconds()
        epochs = {name: count / max(1, self._available[name]) for name, count in by_source.items()}
        self._recorder.step(record, epochs, spec.tokens.seq_len)
        self._skipped = self._skipped + 1 if event.skipped else 0
        if self._skipped >= MAX_SKIPPED_STEPS and not self.diverged:
            self.diverged = f"{self._skipped} steps in a row had no finite loss or gradient; the last is {event.step}"
            os.kill(os.getpid(), signal.SIGTERM)  # on every rank: Megatron saves and ends

    def _take_saved(self, event: Saved) -> None:
        """Rank 0 prints it. With an asynchronous checkpoint, the time since the step includes later steps."""
        self._recorder.checkpointed(event.step, time.monotonic() - self._stepped)
        self._recorder.sync()
        for folder in superfluous(self._spec, event.step):
            # Deleting hundreds of gigabytes takes a while on some volumes, and this thread feeds the watchdogs.
            threading.Thread(target=shutil.rmtree, args=(folder, True), name="prune", daemon=True).start()


def superfluous(spec: TrainSpec, newest: int) -> list[Path]:
    """Megatron's checkpoints besides the `keep_last` newest until step `newest`, and the last one before the decay."""
    folders = {}
    for folder in (Path(spec.run_dir) / MEGATRON_FOLDER).glob("iter_*"):
        step = folder.name.removeprefix("iter_")
        if step.isdecimal() and int(step) <= newest:
            folders[int(step)] = folder
    steps = sorted(folders)
    kept = set(steps[-spec.checkpoint.keep_last :])
    kept |= set([step for step in steps if step <= spec.decay_begins][-1:])
    return [folders[step] for step in steps if step not in kept]


def _seconds_until(spec: TrainSpec, step: int) -> float:
    """Seconds of the steps until `step`, by metrics.jsonl."""
    try:
        lines = (Path(spec.run_dir) / METRICS).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return 0.0
    total = 0.0
    for line in lines:
        try:
            record = json.loads(line)
            total += record["seconds"] if record["step"] <= step else 0.0
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed process
    return total if math.isfinite(total) else 0.0
