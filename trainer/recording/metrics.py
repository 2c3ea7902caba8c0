"""Every Prometheus metric of a run: one table for the ranks, the launcher and the data steps.

Dashboards, alerts and docs may use only metrics of METRICS. Labels never name a run, a step or a host: Kubernetes'
labels do, and a metric must not make a new series at every restart. Counters count since the process started, as
Prometheus expects (`increase` handles a restart as a counter reset).

Values of the whole run (loss, tokens) are exported by rank 0 only; `per_rank` ones by every rank, with a `rank` label.
`trainer/recording/exporter.py` serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.spec import BackendsSpec

PREFIX = "yaongi_"
Process = Literal["trainer", "evaluation", "launcher", "data", "server"]
STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 60, 120, 300)
ANSWER_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)


@dataclass(frozen=True)
class Metric:
    """Name without prefix, kind, help (one sentence), unit for axes, labels besides `rank`, exporting processes, and
    the upper ends of a histogram's buckets.

    `launcher` is any pipeline step that launches a task of the trainer; the label `stage` is a step's name.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    per_rank: bool = False
    processes: tuple[Process, ...] = ("trainer",)
    buckets: tuple[float, ...] = STEP_BUCKETS


EVALUATION: tuple[Process, ...] = ("evaluation",)
LAUNCHER: tuple[Process, ...] = ("launcher",)
DATA: tuple[Process, ...] = ("data",)
SERVER: tuple[Process, ...] = ("server",)

METRICS: tuple[Metric, ...] = (
    Metric(
        "build_info",
        "gauge",
        "1; the labels say which code, device, mesh, precision and implementations run.",
        "",
        ("version", "torch", "device", "mesh", "precision", *BackendsSpec.model_fields),
    ),
    Metric("step_seconds", "histogram", "Duration of one optimizer step.", "s", per_rank=True),
    Metric(
        "phase_seconds_total",
        "counter",
        "Time in each phase of the steps: data, forward_backward, optimizer, device (a GPU finishing what was "
        "launched), validation, checkpoint.",
        "s",
        ("phase",),
        per_rank=True,
    ),
    Metric(
        "own_seconds_total",
        "counter",
        "Time of the rank's own work in the steps, data and forward passes; includes waits for other ranks only "
        "under fsdp or expert parallelism.",
        "s",
        per_rank=True,
    ),
    Metric("step", "gauge", "Optimizer steps of the whole run so far, those before a restart included.", "steps"),
    Metric("planned_steps", "gauge", "Planned optimizer steps of the run.", "steps"),
    Metric("steps_total", "counter", "Optimizer steps done, skipped ones included.", "steps"),
    Metric(
        "skipped_steps_total",
        "counter",
        "Steps without a weight update, by reason: nonfinite, loss_spike, gradient_spike, no_answers.",
        "steps",
        ("reason",),
    ),
    Metric("tokens_total", "counter", "Tokens trained on, all ranks together.", "tokens"),
    Metric("tokens_per_second", "gauge", "Tokens per second over the last step, all ranks together.", "tokens/s"),
    Metric("mfu_ratio", "gauge", "Model FLOPs per second as a share of the device's peak; absent on a CPU.", "ratio"),
    Metric("loss", "gauge", "Mean cross-entropy of the last step.", "nats/token"),
    Metric(
        "auxiliary_loss",
        "gauge",
        "Objectives of the last step beside that: router_balance (weighted, per row), mtp_<depth> (nats/token).",
        "",
        ("objective",),
    ),
    Metric(
        "validation_bits_per_byte",
        "gauge",
        "Bits per byte of held-out text at the last validation by domain; absent without train.evaluate.every_steps.",
        "bits",
        ("domain",),
    ),
    Metric("grad_norm", "gauge", "Global gradient norm of the last step before clipping.", ""),
    Metric("clips_total", "counter", "Steps whose gradients were clipped.", "steps"),
    Metric(
        "benchmark_score",
        "gauge",
        "Scores of the benchmarks that the evaluation has measured so far; LogicKor's are from 1 to 10.",
        "",
        ("task", "metric"),
        processes=EVALUATION,
    ),
    Metric("learning_rate", "gauge", "Learning rate in force, of the matrices.", ""),
    Metric("source_tokens_total", "counter", "Tokens trained on by source.", "tokens", ("source",)),
    Metric("source_epochs", "gauge", "Epochs of each source so far.", "epochs", ("source",)),
    Metric("expert_load_max_ratio", "gauge", "Load of the fullest expert over the mean, worst layer.", "ratio"),
    Metric(
        "expert_starved_ratio",
        "gauge",
        "Share of the experts that got less than a tenth of the mean load in the last step, worst layer.",
        "ratio",
    ),
    Metric(
        "fp8_amax",
        "gauge",
        "Largest magnitude cast to FP8 in the last step by operand: input, weight, gradient; absent without FP8.",
        "",
        ("operand",),
        per_rank=True,
    ),
    Metric(
        "fp8_overflows_total",
        "counter",
        "Tensors whose largest values were clamped because they exceeded the range of their delayed FP8 scale.",
        "tensors",
        per_rank=True,
    ),
    Metric(
        "fp8_tensors",
        "gauge",
        "Tensors that a step casts to FP8; absent without FP8 and where overflows are not counted.",
        "tensors",
        per_rank=True,
    ),
    Metric(
        "memory_bytes",
        "gauge",
        "Peak memory by place: of the GPU's allocator (gpu), of the process (host).",
        "bytes",
        ("place",),
        per_rank=True,
    ),
    Metric(
        "memory_limit_bytes",
        "gauge",
        "Memory there is for the rank: the GPU's (gpu), its share of the container's limit or of the machine (host).",
        "bytes",
        ("place",),
        per_rank=True,
    ),
    Metric("checkpoint_seconds", "gauge", "Duration of the last checkpoint from start to durable.", "s"),
    Metric(
        "checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last durable checkpoint; of the process's start until it has one.",
        "s",
    ),
    Metric("checkpoint_interval_steps", "gauge", "Steps from one checkpoint to the next.", "steps"),
    Metric("checkpoint_failures_total", "counter", "Checkpoints that could not be saved.", "checkpoints"),
    Metric(
        "restarts_total",
        "counter",
        "Restarts of this run so far by cause: terminated, killed, out_of_memory, communication and so on.",
        "restarts",
        ("reason",),
    ),
    Metric(
        "preflight_result",
        "gauge",
        "1 when a check before the start passed, 0 when it warned; one that fails ends the process.",
        "",
        ("check",),
        per_rank=True,
    ),
    Metric(
        "preflight_bytes_per_second",
        "gauge",
        "Measured before the start: datasets (read), checkpoints (written), links (the slowest between two ranks).",
        "bytes/s",
        ("check",),
        per_rank=True,
    ),
    Metric("preflight_seconds", "gauge", "Duration of the checks before the start.", "s", per_rank=True),
    Metric(
        "proof_result",
        "gauge",
        "1 for a kernel that equals its reference on this node's GPU, 0 for one that does not and is passed over.",
        "",
        ("operation", "backend", "format"),
        per_rank=True,
    ),
    Metric(
        "trial_seconds",
        "gauge",
        "Time of a micro-batch forward and backward through all layers, by what a trial before the start changed.",
        "s",
        ("way",),
    ),
    Metric("proof_seconds", "gauge", "Duration of comparing kernels with their references.", "s", per_rank=True),
    Metric(
        "heartbeat_timestamp_seconds",
        "gauge",
        "Unix time at which the rank last finished a step, or a micro-batch of a validation.",
        "s",
        per_rank=True,
    ),
    Metric(
        "goodput_seconds_total",
        "counter",
        "Wall time of this process by class: step, startup, data_wait, validation, checkpoint, lost.",
        "s",
        ("class",),
    ),
    Metric(
        "stage_heartbeat_timestamp_seconds",
        "gauge",
        "Unix time at which a step of the pipeline began or last made progress.",
        "s",
        ("stage",),
        processes=("launcher", "data"),
    ),
    Metric(
        "job_phase",
        "gauge",
        "1 for the phase that the launched job is in: queued, starting, running; 0 for the others.",
        "",
        ("task", "phase"),
        processes=LAUNCHER,
    ),
    Metric(
        "job_phase_seconds_total",
        "counter",
        "Time that the launched job has been in each phase, as long as this launcher has followed it.",
        "s",
        ("task", "phase"),
        processes=LAUNCHER,
    ),
    Metric(
        "job_pod_restarts_total",
        "counter",
        "Pods of the launched job that replaced another pod.",
        "pods",
        ("task",),
        processes=LAUNCHER,
    ),
    Metric(
        "lease_renewals_total",
        "counter",
        "Renewals of the run's lease by outcome: renewed, failed.",
        "renewals",
        ("outcome",),
        processes=LAUNCHER,
    ),
    Metric(
        "stage_bytes_total",
        "counter",
        "Bytes that a step of the pipeline has worked through, read and written ones, as its progress line shows them.",
        "bytes",
        ("stage",),
        processes=DATA,
    ),
    Metric(
        "download_bytes_total",
        "counter",
        "Bytes taken in by source: over the network, or read from local files.",
        "bytes",
        ("source",),
        processes=DATA,
    ),
    Metric("download_retries_total", "counter", "Requests that were retried.", "requests", processes=DATA),
    Metric(
        "documents_total",
        "counter",
        "Documents that a step of the pipeline (download, shards) has written.",
        "documents",
        ("stage", "source"),
        processes=DATA,
    ),
    Metric(
        "text_bytes_total",
        "counter",
        "UTF-8 bytes of text in those documents.",
        "bytes",
        ("stage", "source"),
        processes=DATA,
    ),
    Metric(
        "shard_tokens_total", "counter", "Tokens written to token files.", "tokens", ("source", "split"), processes=DATA
    ),
    Metric(
        "left_out_documents_total",
        "counter",
        "Documents that hygiene leaves out, by the filter that says so.",
        "documents",
        ("filter",),
        processes=DATA,
    ),
    Metric(
        "files_verified_total",
        "counter",
        "Files of an earlier run whose checksum was verified.",
        "files",
        ("stage",),
        processes=DATA,
    ),
    Metric(
        "serve_requests_total",
        "counter",
        "Requests by path and status; 499 when the client left before the answer began.",
        "requests",
        ("path", "code"),
        processes=SERVER,
    ),
    Metric(
        "serve_refused_total",
        "counter",
        "Answers that are errors, by reason: rate_limit_exceeded, context_length_exceeded, invalid_api_key and so on.",
        "requests",
        ("reason",),
        processes=SERVER,
    ),
    Metric(
        "serve_request_seconds",
        "histogram",
        "Duration of requests that were answered, from their arrival to the last byte.",
        "s",
        processes=SERVER,
        buckets=ANSWER_BUCKETS,
    ),
    Metric(
        "serve_first_token_seconds",
        "histogram",
        "Time from the arrival of a request to the first token of each of its texts.",
        "s",
        processes=SERVER,
        buckets=ANSWER_BUCKETS,
    ),
    Metric(
        "serve_inter_token_seconds",
        "histogram",
        "Time from one token of a text to the next.",
        "s",
        processes=SERVER,
        buckets=TOKEN_BUCKETS,
    ),
    Metric("serve_prompt_tokens_total", "counter", "Tokens of prompts.", "tokens", processes=SERVER),
    Metric("serve_completion_tokens_total", "counter", "Tokens written.", "tokens", processes=SERVER),
    Metric("serve_running_texts", "gauge", "Texts that are continued at the moment.", "texts", processes=SERVER),
    Metric("serve_waiting_texts", "gauge", "Texts that wait for one of those to end.", "texts", processes=SERVER),
)
BY_NAME = {metric.name: metric for metric in METRICS}
