"""Records the numbers of a run: files of lines, progress line, TensorBoard, Prometheus, and result.json at the end."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trainer import thismachine
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.gpus import by_device
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointManifest
from trainer.data.plan import Cursor
from trainer.distributed import World
from trainer.files import atomic_write
from trainer.fp8.state import Fp8State
from trainer.fp8.te import TeState
from trainer.preflight import Finding, of_entrypoint
from trainer.process import hostmemory, restarts
from trainer.process.failures import node_name
from trainer.process.owntime import OwnTime
from trainer.proof.start import Proof
from trainer.proof.trial import Trial, table
from trainer.recording.advice import MARK, WINDOW, advice
from trainer.recording.exporter import Metrics
from trainer.recording.goodput import Ledger
from trainer.recording.logs import VALIDATIONS, MetricsFile
from trainer.recording.results import headline_loss, loss_of
from trainer.recording.trackers.base import STOPPED, Tracker
from trainer.recording.trackers.board import Board
from trainer.recording.trackers.keys import wanted as wanted_trackers
from trainer.recording.trackers.remote import Remote
from trainer.recording.trainerstatus import Progress, TrainerStatus
from trainer.spec import TrainSpec
from trainer.spikes import SKIP_REASONS, SkipReason

log = logging.getLogger(__name__)

_GOODPUT = {
    "data": "data_wait",
    "forward_backward": "step",
    "optimizer": "step",
    "device": "step",
    "validation": "validation",
    "checkpoint": "checkpoint",
}
_AFTER_STEP = ("validation", "checkpoint")  # phases that do not count as time of the step before them
_POSTED = ("step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second")
_SCALARS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "expert_load_max_ratio", "expert_starved_ratio")


def peak_flops(device: torch.device) -> float | None:
    """Dense BF16 FLOP/s of one device by its name; None for a CPU and for a GPU that is not in the table."""
    gpu = by_device(device_name(device))
    return gpu.flops if gpu else None


def device_name(device: torch.device) -> str:
    """As CUDA names it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class StepRecord:
    """One step, a line of metrics.jsonl.

    Attributes:
        loss: cross-entropy of the next token, the mean over all labels of the step.
        auxiliary: the other objectives by name (router_balance, mtp_1, …), unweighted if they have a weight.
        skipped: why the step was skipped; None if it was not.
        tokens: number of tokens trained on so far.
        expert_load_max_ratio, expert_starved_ratio: None from an engine that does not say them.
        trained_share: share of the step's tokens that are labels; None if all tokens of all sources are trained.
    """

    step: int
    loss: float
    auxiliary: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    clipped: bool
    skipped: SkipReason | None
    expert_load_max_ratio: float | None
    expert_starved_ratio: float | None
    by_source: dict[str, int]
    trained_share: float | None = None


@dataclass(frozen=True)
class Resumed:
    """Where a process begins.

    Attributes:
        seconds: of the run before.
        trained: tokens by source.
        saved: Unix time of that checkpoint; of the process's start without one.
    """

    step: int
    seconds: float
    trained: dict[str, int]
    saved: float


class Recorder:
    """One per rank; ranks other than 0 only export their own metrics."""

    def __init__(self, spec: TrainSpec, world: World, started: float) -> None:
        self._spec, self._world, self._started = spec, world, started
        wanted = spec.runtime.metrics_port and spec.runtime.metrics_port + world.local_rank
        stride = world.local_size if thismachine.port_may_move(spec.runtime) else 0
        self.metrics = Metrics(rank=world.rank, port=wanted, stride=stride)
        self._moved_from = wanted if wanted != self.metrics.port else None
        self.own = OwnTime(world.device)
        self._file: MetricsFile | None = None
        self._validations: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._remote: Remote | None = None
        self._ledger: Ledger | None = None
        self._status: TrainerStatus | None = None
        self._scores: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._phase, self._steps_done = "preparation", 0
        self._sources: dict[str, int] = {}
        self._rate: float | None = None
        self._last: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._fp8_overflows = 0.0
        self._fp8_line: dict[str, dict[str, float]] = {}
        self._flops_per_token = lru_cache(lambda seq_len: flops_per_token(spec.model, seq_len))
        self._peak_flops = peak_flops(world.device)
        self.seconds_before = 0.0

    def begin(self, resumed: CheckpointManifest | None, build_info: dict[str, str]) -> None:
        """Open the files after the resumed step and account for the time until now."""
        where = Resumed(0, 0.0, {}, self._started)
        if resumed:
            trained = Cursor.from_dict(resumed.cursor).trained
            saved = checkpoint.step_dir(self._spec.run_dir, resumed.step).stat().st_mtime
            where = Resumed(resumed.step, resumed.scalars.get("seconds", 0.0), trained, saved)
        self.begin_at(where, build_info)

    def begin_at(self, where: Resumed, build_info: dict[str, str]) -> None:
        """As `begin`, from a checkpoint that is not ours."""
        step, self._sources, self.seconds_before = where.step, where.trained, where.seconds
        version = importlib.metadata.version("yaongi")
        self.metrics.set("build_info", 1, version=version, torch=torch.__version__, **build_info)
        self.metrics.add("goodput_seconds_total", time.time() - self._started, **{"class": "startup"})
        for reason in SKIP_REASONS:  # start at 0, else the first one would not show as an increase
            self.metrics.add("skipped_steps_total", 0, reason=reason)
        self._steps_done = step
        self.metrics.set("step", step)
        self.metrics.set("planned_steps", self._spec.steps)
        self.metrics.set("checkpoint_interval_steps", self._spec.checkpoint.every_steps)
        self.metrics.set("checkpoint_last_success_timestamp_seconds", where.saved)
        self._export_memory_limits()
        ports = self._world.gather(self.metrics.port)
        if not self._world.is_main:
            return
        if self._moved_from:
            log.info("metrics of rank 0: port %d, as %d is taken", self.metrics.port, self._moved_from)
        atomic_write(Path(self._spec.run_dir) / thismachine.PORTS_FILE, json.dumps({"ports": ports}).encode())
        self._file = MetricsFile(self._spec.run_dir, step)
        dropped = self._file.dropped
        self.metrics.add("goodput_seconds_total", sum(line["seconds"] for line in dropped), **{"class": "lost"})
        if self._spec.evaluate.every_steps or (Path(self._spec.run_dir) / VALIDATIONS).exists():
            self._validations = MetricsFile(self._spec.run_dir, step, VALIDATIONS)
            for scores in list(self._validations.records())[-1:]:  # shown until there are newer ones
                self._export_validation(scores)
        self._trackers = [Board(self._spec.run_dir, step)]
        causes = restarts.summary(self._spec.run_dir)
        self._ledger = Ledger(self._spec.run_dir, self._started, step, dropped, causes)
        self._ledger.write(step, at_once=True)
        self._open_trackers(step)
        self._status = TrainerStatus.from_environment()
        self._post(step, None, {})
        for cause, count in (dict.fromkeys(restarts.REASONS, 0) | causes).items():
            self.metrics.add("restarts_total", count, reason=cause)

    def preflight(self, findings: list[Finding]) -> None:
        """Export the preflight results; the node's checks are exported by its first rank."""
        everything = [*(of_entrypoint() if self._world.local_rank == 0 else []), *findings]
        for finding in everything:
            self.metrics.set("preflight_result", not finding.warning, check=finding.check)
            if finding.bytes_per_second is not None:
                self.metrics.set("preflight_bytes_per_second", finding.bytes_per_second, check=finding.check)
        if everything:
            self.metrics.set("preflight_seconds", sum(finding.seconds for finding in everything))

    def proof(self, proofs: dict[str, Proof]) -> None:
        """Export what the node has proven; its first rank does."""
        proof = proofs.get(node_name())
        if self._world.local_rank or proof is None:
            return
        for record in proof.records:
            labels = {"operation": record.op, "backend": record.backend, "format": record.variant}
            self.metrics.set("proof_result", record.passed, **labels)
        if proof.made:
            self.metrics.set("proof_seconds", proof.seconds)

    def trial(self, trial: Trial) -> None:
        """Log and export how fast the proven ways are."""
        for row in trial.rows:
            if row.seconds is not None:
                self.metrics.set("trial_seconds", row.seconds, way=row.change)
        if self._world.is_main:
            for line in table(trial):
                log.info("trial: %s", line)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of a step: data, forward_backward, optimizer, device, validation or checkpoint.

        On a GPU forward_backward and optimizer only launch kernels; in device the host waits for them.
        """
        began = time.perf_counter()
        self._phase = name
        try:
            yield
        finally:
            self.spent(name, time.perf_counter() - began)

    def spent(self, name: str, seconds: float) -> None:
        """Count time of a phase that has ended."""
        self._phases[name] = self._phases.get(name, 0.0) + seconds
        self.metrics.add("phase_seconds_total", seconds, phase=name)
        self.metrics.add("goodput_seconds_total", seconds, **{"class": _GOODPUT[name]})
        if self._ledger:
            self._ledger.add(_GOODPUT[name], seconds)
        if name == "data":
            self.metrics.add("own_seconds_total", seconds)

    def doing(self) -> str:
        """The current phase; may be called from another thread."""
        return f"{self._phase} of step {self._steps_done + (self._phase not in _AFTER_STEP)}"

    def step_seconds(self) -> float:
        """Seconds in all phases except validation and checkpoint since the last call."""
        seconds = sum(value for name, value in self._phases.items() if name not in _AFTER_STEP)
        self._phases.clear()
        return seconds

    def step(self, record: StepRecord, epochs: dict[str, float], seq_len: int) -> None:
        """Export one finished step, whose rows had `seq_len` tokens."""
        self._export(record, epochs, seq_len)
        self._steps_done = record.step
        if self._file is None or self._ledger is None:
            return
        self._ledger.write(record.step)
        line = {k: v for k, v in vars(record).items() if k != "trained_share" or v is not None}
        mfu = self._mfu(record, seq_len)
        self._file.write(line | ({} if mfu is None else {"mfu": mfu}) | self._fp8_line)
        self._last.append(line)
        scalars = {name: value for name in _SCALARS if (value := getattr(record, name)) is not None} | record.auxiliary
        if self._fp8_line:
            fp8 = {f"fp8/{name}": value for name, value in self._fp8_line["fp8"].items()}
        else:
            fp8 = {}
        self._track(record.step, {f"train/{name}": value for name, value in scalars.items()} | fp8)
        speed = record.tokens_per_second
        self._rate = speed if self._rate is None else 0.9 * self._rate + 0.1 * speed
        left = (self._spec.steps - record.step) * self._spec.batch.tokens_per_step / self._rate
        self._post(record.step, left, {name: getattr(record, name) for name in _POSTED})
        if record.step % self._spec.runtime.log_every_steps == 0 or record.step in (1, self._spec.steps):
            log.info(
                "step %d/%d  loss %.4f  grad %.3f  lr %.2e  %s tokens/s  ETA %s%s%s",
                record.step,
                self._spec.steps,
                record.loss,
                record.grad_norm,
                record.learning_rate,
                f"{speed:,.0f}",
                timedelta(seconds=round(left)),
                "" if record.trained_share is None else f"  answers {record.trained_share:.0%}",
                f"  (skipped: {record.skipped})" if record.skipped else "",
            )

        if record.step % WINDOW == 0 or record.step == self._spec.steps:
            for said in advice(self._last, self._spec):
                log.info("%s%s", MARK, said)

    def beat(self) -> None:
        """Export that this rank makes progress."""
        self.metrics.set("heartbeat_timestamp_seconds", time.time())

    def validated(self, scores: dict[str, Any]) -> None:
        """Record a line of validation.jsonl (trainer/validation.py)."""
        if self._validations is None:
            return
        self._validations.write(scores)
        self._export_validation(scores)
        for said in advice((), self._spec, list(self._validations.records())):
            log.info("%s%s", MARK, said)
        domains: dict[str, dict[str, float]] = scores["domains"]
        points = {f"{key}/{name}": domain[key] for key in ("bits_per_byte", "loss") for name, domain in domains.items()}
        self._track(scores["step"], {f"validation/{name}": value for name, value in points.items()})
        log.info(
            "validation after step %d: %s bits per byte of held-out text (%.1f s)",
            scores["step"],
            "  ".join(f"{name} {domain['bits_per_byte']:.4f}" for name, domain in domains.items()),
            scores["seconds"],
        )

    def fp8(self, step: int, state: Fp8State | TeState) -> None:
        """Export FP8 statistics only every `log_every_steps` steps, because reading them waits for the device."""
        self._fp8_line = {}
        if step % self._spec.runtime.log_every_steps:
            return
        amax, overflows = state.figures()
        if state.counted_tensors:
            self.metrics.set("fp8_tensors", state.counted_tensors)
        for operand, value in amax.items():
            self.metrics.set("fp8_amax", value, operand=operand)
        self.metrics.add("fp8_overflows_total", overflows - self._fp8_overflows)
        self._fp8_overflows = overflows
        self._fp8_line = {"fp8": {**amax, "overflows": overflows}}

    def checkpointed(self, step: int, seconds: float) -> None:
        """A checkpoint was published; may come from another thread."""
        self.metrics.set("checkpoint_seconds", seconds)
        self.metrics.set("checkpoint_last_success_timestamp_seconds", time.time())
        log.info("checkpoint of step %d published after %.1f s", step, seconds)

    def checkpoint_failed(self) -> None:
        """A checkpoint could not be saved; may come from another thread."""
        self.metrics.add("checkpoint_failures_total")

    def sync(self) -> None:
        """Make metrics.jsonl, goodput.json and TensorBoard durable up to here."""
        if self._file and self._ledger:
            self._file.sync()
            for tracker in self._trackers:
                tracker.flush()
            self._ledger.write(self._steps_done, at_once=True)
        if self._validations:
            self._validations.sync()

    def seconds(self) -> float:
        """Wall seconds of the run, including earlier processes up to their last checkpoint."""
        return self.seconds_before + time.time() - self._started

    def result(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        """Write result.json and log the outcome in one line."""
        if self._file is None:
            return
        records = list(self._file.records())
        by_source = Cursor.from_dict(manifest.cursor).trained if manifest.cursor else self._sources
        tokens, spent = sum(by_source.values()), self.seconds()
        rate = tokens / spent
        if records:  # else metrics.jsonl was deleted, and only the checkpoint is known
            spent = sum(record["seconds"] for record in records)
            rate = sum(record["tokens_per_second"] * record["seconds"] for record in records) / spent
        loss, loss_steps = headline_loss(records)
        result = {
            "steps": manifest.step,
            "tokens": tokens,
            "loss_first": records[0]["loss"] if records else None,
            "loss_last": records[-1]["loss"] if records else None,
            "loss": loss,
            "loss_steps": loss_steps,
            "tokens_per_second": rate,
            "checkpoint": str(checkpoint),
            "checkpoint_digest": manifest.digest,
            "world_size": self._world.size,
            "device": device_name(self._world.device),
            "seconds": self.seconds(),
            "restarts": restarts.count(self._spec.run_dir),
        }
        atomic_write(Path(self._spec.run_dir) / "result.json", json.dumps(result, indent=1).encode())
        if self._remote:
            self._remote.summary(result | {"report": str(Path(self._spec.run_dir) / "report.html")})
            self._remote.event("end", {"state": "finished", "step": manifest.step, "loss": loss, "tokens": tokens})
        log.info(
            "done: %d steps, %s tokens, loss %.4f → %.4f (%s), %s tokens/s, %d restart%s, checkpoint %s",
            result["steps"],
            f"{tokens:,}",
            result["loss_first"] or float("nan"),
            float("nan") if loss is None else loss,
            loss_of(loss_steps),
            f"{result['tokens_per_second']:,.0f}",
            result["restarts"],
            "s" * (result["restarts"] != 1),
            checkpoint,
        )

    def close(self) -> None:
        self.metrics.close()
        if self._file and self._ledger:
            self._ledger.write(self._steps_done, at_once=True)
            self._file.close()
            if self._remote and not self._remote.ended:
                self._remote.event("end", {"state": STOPPED, "step": self._steps_done})
            for tracker in self._trackers:
                tracker.close()
        if self._status:
            self._status.close()
        if self._validations:
            self._validations.close()

    def _export(self, record: StepRecord, epochs: dict[str, float], seq_len: int) -> None:
        metrics = self.metrics
        for name in _SCALARS:
            if (value := getattr(record, name)) is not None:
                metrics.set(name, value)
        for objective, loss in record.auxiliary.items():
            metrics.set("auxiliary_loss", loss, objective=objective)
        metrics.observe("step_seconds", record.seconds)
        metrics.add("own_seconds_total", self.own.take())
        metrics.set("step", record.step)
        metrics.add("steps_total")
        if record.skipped:
            metrics.add("skipped_steps_total", reason=record.skipped)
        metrics.add("clips_total", record.clipped)
        metrics.add("tokens_total", self._spec.batch.tokens_per_step)
        for source, tokens in record.by_source.items():
            metrics.add("source_tokens_total", max(0, tokens - self._sources.get(source, 0)), source=source)
            metrics.set("source_epochs", epochs[source], source=source)
        self._sources = record.by_source
        self.beat()
        metrics.set("memory_bytes", hostmemory.peak_bytes(), place="host")
        if self._world.device.type == "cuda":
            metrics.set("memory_bytes", torch.cuda.max_memory_allocated(self._world.device), place="gpu")
        if (mfu := self._mfu(record, seq_len)) is not None:
            metrics.set("mfu_ratio", mfu)

    def _open_trackers(self, step: int) -> None:
        """The trackers of the spec, and what they are told at the start."""
        if wanted_trackers(self._spec) is None or self._ledger is None:
            return
        self._remote = Remote(self._spec, trains=True)
        self._trackers.append(self._remote)
        facts = {"step": step, "steps": self._spec.steps, "ranks": self._world.size}
        if (restart := self._ledger.restart) is None:
            self._remote.event("start", facts)
        else:
            self._remote.event("restart", facts | {"reason": restart.reason, "reached": restart.reached})

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.add(step, values)

    def _mfu(self, record: StepRecord, seq_len: int) -> float | None:
        """Model FLOPs per second as a share of the devices' peak; None if that is unknown."""
        if not self._peak_flops:
            return None
        flops = self._flops_per_token(seq_len) * record.tokens_per_second
        return flops / (self._peak_flops * self._world.size)

    def _post(self, step: int, seconds_left: float | None, metrics: dict[str, float]) -> None:
        """Show the progress in a TrainJob's status, if its Trainer takes it."""
        if self._status:
            self._status.update(Progress(step, self._spec.steps, seconds_left, metrics | self._scores))

    def _export_validation(self, scores: dict[str, Any]) -> None:
        for name, domain in scores["domains"].items():
            if domain["bits_per_byte"] is not None:  # of a file; it was not finite
                self.metrics.set("validation_bits_per_byte", domain["bits_per_byte"], domain=name)
                self._scores[f"validation_bits_per_byte_{name}"] = domain["bits_per_byte"]

    def _export_memory_limits(self) -> None:
        self.metrics.set("memory_limit_bytes", hostmemory.limit_bytes() / self._world.local_size, place="host")
        if self._world.device.type == "cuda":
            total = torch.cuda.get_device_properties(self._world.device).total_memory
            self.metrics.set("memory_limit_bytes", total, place="gpu")
