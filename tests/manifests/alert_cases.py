"""For each alert, series that must make it fire and series that must not, in the notation of `promtool test rules`.

A value each minute: `0+60x20` rises by 60 for 20 minutes, `5x20` stays, `stale` ends the series as a finished pod does.
Labels are those that the monitors attach (manifests/monitors.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

COMMON = {"namespace": "ml", "run": "tiny-1a2b"}


@dataclass(frozen=True)
class Case:
    """`at`: the minute of the check; `fires`: the labels of the alert, None if nothing may fire."""

    alert: str
    story: str
    at: int
    fires: dict[str, str] | None
    series: dict[str, str] = field(default_factory=dict)


def of(name: str, **labels: str) -> str:
    """A series of a worker, or of a step's pod if a pod is named."""
    worker = labels.get("rank", "0")
    own = {"pod": f"tiny-1a2b-worker-{worker}", "instance": f"10.0.0.{worker}:9400", "job": "yaongi-trainer"}
    matchers = ",".join(f'{label}="{value}"' for label, value in ({**COMMON, **own, **labels}).items())
    return f"{name}{{{matchers}}}"


def steps(seconds: int, minutes: int, rank: str = "0") -> dict[str, str]:
    """The histogram of a rank whose steps all take this number of seconds."""
    return {
        of("yaongi_step_seconds_sum", rank=rank): f"0+60x{minutes}",
        of("yaongi_step_seconds_count", rank=rank): f"0+{60 / seconds:g}x{minutes}",
    }


def progress(step: str, planned: int = 1000) -> dict[str, str]:
    return {of("yaongi_step"): step, of("yaongi_planned_steps"): f"{planned}x200"}


def alive(minutes: int) -> dict[str, str]:
    return progress(f"0+2x{minutes} stale")


def beat(values: str, rank: str = "0") -> dict[str, str]:
    return {of("yaongi_heartbeat_timestamp_seconds", rank=rank): values}


def own_time(seconds_a_minute: float, rank: str) -> dict[str, str]:
    return {of("yaongi_own_seconds_total", rank=rank): f"0+{seconds_a_minute:g}x60"} | steps(10, 60, rank)


def shares(data: float, lasting: str = "x60") -> dict[str, str]:
    parts = {"data": data, "forward_backward": 55 - data, "optimizer": 5.0}
    return {
        of("yaongi_phase_seconds_total", phase=name, rank="0"): f"0+{value:g}{lasting}" for name, value in parts.items()
    }


def memory(used: float) -> dict[str, str]:
    labels = {"place": "gpu", "rank": "0"}
    return {of("yaongi_memory_bytes", **labels): f"{used:g}x30", of("yaongi_memory_limit_bytes", **labels): "80e9x30"}


def checkpoints(saved: str, count: int = 90) -> dict[str, str]:
    """Steps of 10 s, a checkpoint every 60 of them, so every 10 minutes."""
    limits = {of("yaongi_checkpoint_interval_steps"): "60x90"}
    return {of("yaongi_checkpoint_last_success_timestamp_seconds"): saved, **limits, **steps(10, count)}


def fp8(overflows: float) -> dict[str, str]:
    """600 tensors a step, 6 steps a minute."""
    counts = {of("yaongi_fp8_tensors", rank="0"): "600x60"}
    return {of("yaongi_fp8_overflows_total", rank="0"): f"0+{overflows:g}x60", **counts, **steps(10, 60)}


LAUNCHER = {"pod": "pretrain-x-train", "job": "yaongi-step", "instance": "10.0.1.1:9390"}
DOWNLOAD = {"pod": "pretrain-x-download", "job": "yaongi-step", "instance": "10.0.1.2:9390"}
RANK_1, RANK_0, RUN = {"rank": "1"}, {"rank": "0"}, {"run": "tiny-1a2b"}


def skipped(reason: str, values: str, **labels: str) -> dict[str, str]:
    return {of("yaongi_skipped_steps_total", reason=reason, **labels): values}


def restarts(values: str, instance: str = "10.0.0.0:9400") -> dict[str, str]:
    return {of("yaongi_restarts_total", reason="killed", instance=instance): values}


def queued(seconds: str, now: int) -> dict[str, str]:
    labels = {"task": "train", "phase": "queued"} | LAUNCHER
    return {of("yaongi_job_phase_seconds_total", **labels): seconds, of("yaongi_job_phase", **labels): f"{now}x90"}


def renewals_failed(values: str) -> dict[str, str]:
    return {of("yaongi_lease_renewals_total", outcome="failed", **LAUNCHER): values}


def stage(name: str, values: str) -> dict[str, str]:
    return {of("yaongi_stage_heartbeat_timestamp_seconds", stage=name, **DOWNLOAD): values}


def failures(values: str) -> dict[str, str]:
    return {of("yaongi_checkpoint_failures_total"): values}


CASES = [
    Case("HeartbeatStale", "one rank stops", 29, RANK_1, beat("0+60x20 1200x20", "1") | steps(10, 40, "1")),
    Case("HeartbeatStale", "steps of 5 minutes", 29, None, beat("0x4 300x4 600x4 900x4 1200x14") | steps(300, 40)),
    Case("HeartbeatStale", "the run has finished", 35, None, beat("0+60x20 stale") | steps(10, 20)),
    Case("HeartbeatStale", "no step has been made yet", 40, None, {of("yaongi_step_seconds_count", rank="0"): "0x60"}),
    Case("NoProgress", "hangs", 75, RUN, progress("0+10x20 200x90")),
    Case("NoProgress", "restarts from the same checkpoint", 90, RUN, progress(" ".join(["100+5x9"] * 10))),
    Case("NoProgress", "goes on", 90, None, progress("0+10x99")),
    Case("NoProgress", "goes on after a restart that lost steps", 80, None, progress("0+10x40 250+10x60")),
    Case("NoProgress", "all done, the last checkpoint takes an hour", 90, None, progress("0+50x19 1000x90")),
    Case("NoProgress", "was stopped by a person", 65, None, progress("0+10x20 stale")),
    Case("NoProgress", "no step has been made yet", 90, None, progress("0x100")),
    Case("NonFinite", "four steps in a row", 16, RUN, skipped("nonfinite", "0x10 1 2 3 4 4x20")),
    Case("NonFinite", "one step", 16, None, skipped("nonfinite", "0x10 1x20")),
    Case("NonFinite", "two before a restart, none after", 16, None, skipped("nonfinite", "0x6 2x3 stale") | skipped(
        "nonfinite", "_x11 0x20", instance="10.0.0.9:9400")),
    Case("NonFinite", "other reasons", 16, None, skipped("gradient_spike", "0+1x30")),
    Case("LossSpike", "a jump that stays", 47, RUN, {of("yaongi_loss"): "3x40 4x20"} | alive(90)),
    Case("LossSpike", "a restart comes before the jump", 47, RUN, {
        of("yaongi_loss"): "3x20 stale", of("yaongi_loss", instance="10.0.0.9:9400"): "_x21 3x18 4x20"} | alive(90)),
    Case("LossSpike", "the guard keeps skipping", 20, RUN, skipped("loss_spike", "0+1x30") | alive(90)),
    Case("LossSpike", "the usual fall", 47, None, {of("yaongi_loss"): "10-0.1x60"} | alive(90)),
    Case("LossSpike", "one bad step", 47, None, {of("yaongi_loss"): "3x40 4 3x20"} | alive(90)),
    Case("LossSpike", "the run has finished", 25, None, skipped("loss_spike", "0+1x20") | alive(20)),
    Case("RestartStorm", "a new process each five minutes", 22, RUN, restarts("0x5 stale") | restarts(
        "_x6 1x5 stale", "10.0.0.1:9400") | restarts("_x12 2x5 stale", "10.0.0.2:9400") | restarts(
        "_x18 3x20", "10.0.0.3:9400")),
    Case("RestartStorm", "pods that never get so far as to be scraped", 22, {"pod": LAUNCHER["pod"]}, {
        of("yaongi_job_pod_restarts_total", task="train", **LAUNCHER): "0x5 1x5 2x5 3x20"}),
    Case("RestartStorm", "one restart", 22, None, restarts("0x5 1x30")),
    Case("RestartStorm", "a run that had many last week", 22, None, restarts("_x5 7x30")),
    Case("RestartStorm", "went through it and has finished", 32, None, restarts("0x5 1x5 2x5 3x5 stale")),
    Case("CheckpointTooOld", "none is saved any more", 50, RUN, checkpoints("0x9 600x80")),
    Case("CheckpointTooOld", "one every ten minutes", 50, None, checkpoints(
        "0x9 600x9 1200x9 1800x9 2400x9 3000x9 3600x9")),
    Case("CheckpointTooOld", "no step has been made yet", 60, None, checkpoints("0x90") | {
        of("yaongi_step_seconds_sum", rank="0"): "0x90", of("yaongi_step_seconds_count", rank="0"): "0x90"}),
    Case("CheckpointTooOld", "the run has finished", 50, None, checkpoints("0x9 600x5 stale", 15)),
    Case("CheckpointFailing", "a full disk", 12, RUN, failures("0x10 1x20") | alive(30)),
    Case("CheckpointFailing", "all saved", 12, None, failures("0x30") | alive(30)),
    Case("CheckpointFailing", "the run has finished", 25, None, failures("0x10 1x10 stale") | alive(20)),
    Case("DataStall", "a third of the time", 30, RANK_0, shares(20)),
    Case("DataStall", "a tenth of the time", 30, None, shares(6)),
    Case("DataStall", "the run has finished", 45, None, shares(20, "x20 stale")),
    Case("Straggler", "one of four", 30, RANK_1, own_time(30, "0") | own_time(50, "1") | own_time(30, "2")
         | own_time(31, "3")),
    Case("Straggler", "all alike", 30, None, own_time(30, "0") | own_time(33, "1") | own_time(31, "2")),
    Case("Straggler", "twice as long, but next to nothing", 30, None, own_time(0.6, "0") | own_time(1.2, "1")
         | own_time(0.6, "2")),
    Case("ExpertCollapse", "half of them", 40, RUN, {of("yaongi_expert_starved_ratio"): "0.5x60"} | alive(90)),
    Case("ExpertCollapse", "balanced", 40, None, {of("yaongi_expert_starved_ratio"): "0.05x60"} | alive(90)),
    Case("ExpertCollapse", "some minutes only", 40, None, {
        of("yaongi_expert_starved_ratio"): "0x20 0.5x5 0x35"} | alive(90)),
    Case("ExpertCollapse", "the run has finished", 32, None, {
        of("yaongi_expert_starved_ratio"): "0.5x25 stale"} | alive(25)),
    Case("Fp8Overflow", "two in a hundred", 30, RANK_0, fp8(72)),
    Case("Fp8Overflow", "two in a thousand", 30, None, fp8(7.2)),
    Case("Fp8Overflow", "no FP8", 30, None, {of("yaongi_fp8_overflows_total", rank="0"): "0x60"} | steps(10, 60)),
    Case("MemoryNearLimit", "78 of 80 GB", 10, {"rank": "0", "place": "gpu"}, memory(78e9)),
    Case("MemoryNearLimit", "60 of 80 GB", 10, None, memory(60e9)),
    Case("QueueWait", "no room for 40 minutes", 40, {"task": "train", "run": "tiny-1a2b"}, queued("0+60x90", 1)),
    Case("QueueWait", "ten minutes", 10, None, queued("0+60x90", 1)),
    Case("QueueWait", "had to wait, runs now", 60, None, queued("0+60x40 2400x50", 0)),
    Case("LeaseRenewalFailing", "each one for a minute", 12, {"pod": LAUNCHER["pod"]},
         renewals_failed("0x10 8 16 24")),
    Case("LeaseRenewalFailing", "one that was lost", 12, None, renewals_failed("0x10 1x20")),
    Case("DataStepStalled", "a server that does not send", 45, {"stage": "download"},
         stage("download", "0+60x5 300x60")),
    Case("DataStepStalled", "slow, but it moves", 45, None, stage("shards", "0+60x60")),
    Case("DataStepStalled", "launching on this machine shows no progress", 45, None, stage("train", "0x60")),
    Case("TargetDown", "the process is stopped", 13, RANK_1 | {"job": "yaongi-trainer"}, {
        of("up", **RANK_1): "1x9 0x20"}),
    Case("TargetDown", "not up yet", 20, None, {of("up"): "0x30"}),
    Case("TargetDown", "a new pod in its place", 20, None, {
        of("up"): "1x9 stale", of("up", instance="10.0.0.9:9400"): "_x10 0x20"}),
    Case("TargetDown", "finished", 20, None, {of("up"): "1x9 stale"}),
    Case("TargetDown", "somebody else's target", 20, None, {of("up", job="node-exporter"): "1x9 0x20"}),
]  # fmt: skip
