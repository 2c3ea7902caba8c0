"""Every Prometheus metric of a run: one table, one registry, one small HTTP server thread for each rank.

Dashboards, alerts and docs may use only what METRICS defines. Labels never hold a run, a step or a host: those are
Kubernetes' labels, and a metric must not make a new series on every restart. Counters count since the process started,
as Prometheus expects (`increase` sees a restart as a reset).

Values of the whole run (loss, tokens) are exported by rank 0 only; `per_rank` ones by every rank, with a `rank` label.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

disable_created_metrics()  # a second series for each counter that nobody reads

PREFIX = "yaongi_"
STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 60, 120, 300)


@dataclass(frozen=True)
class Metric:
    """Name without prefix, kind, help (one sentence), unit for axes, labels besides `rank`."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    per_rank: bool = False


METRICS: tuple[Metric, ...] = (
    Metric(
        "build_info",
        "gauge",
        "1; the labels say which code, device, mesh, precision and implementations run.",
        "",
        ("version", "torch", "device", "mesh", "precision", "ssd", "conv", "attention", "experts"),
    ),
    Metric("step_seconds", "histogram", "Duration of one optimizer step.", "s", per_rank=True),
    Metric(
        "phase_seconds_total",
        "counter",
        "Time in each phase of the steps: data, forward_backward, optimizer, checkpoint.",
        "s",
        ("phase",),
        per_rank=True,
    ),
    Metric("steps_total", "counter", "Optimizer steps done, skipped ones included.", "steps"),
    Metric(
        "skipped_steps_total",
        "counter",
        "Steps that changed nothing, by reason: nonfinite, loss_spike, gradient_spike.",
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
    Metric("grad_norm", "gauge", "Global gradient norm of the last step before clipping.", ""),
    Metric("clips_total", "counter", "Steps whose gradients were clipped.", "steps"),
    Metric("learning_rate", "gauge", "Learning rate in force, of the matrices.", ""),
    Metric("source_tokens_total", "counter", "Tokens trained on by source.", "tokens", ("source",)),
    Metric("source_epochs", "gauge", "Times that each source has been gone through.", "epochs", ("source",)),
    Metric("expert_load_max_ratio", "gauge", "Load of the fullest expert over the mean, worst layer.", "ratio"),
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
        "Tensors whose largest numbers were clamped, as delayed FP8 scaling had foreseen smaller ones.",
        "tensors",
        per_rank=True,
    ),
    Metric(
        "memory_bytes", "gauge", "Peak memory: of the GPU allocator, on a CPU of the process.", "bytes", per_rank=True
    ),
    Metric("checkpoint_seconds", "gauge", "Duration of the last checkpoint from start to durable.", "s"),
    Metric("checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the last durable checkpoint.", "s"),
    Metric("restarts_total", "counter", "Restarts of this run so far by reason.", "restarts", ("reason",)),
    Metric(
        "heartbeat_timestamp_seconds", "gauge", "Unix time at which the rank last finished a step.", "s", per_rank=True
    ),
    Metric(
        "goodput_seconds_total",
        "counter",
        "Wall time of this process by class: step, startup, data_wait, checkpoint, lost.",
        "s",
        ("class",),
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}


class Metrics:
    """What one rank exports.

    Gauges appear when they are first set (an unset one would read 0, which is untrue); counters without labels
    start at 0.

    Args:
        rank: of this process; any but 0 exports only the `per_rank` metrics and ignores the others.
        port: to serve /metrics on (all interfaces); 0 serves nothing.

    Raises:
        ValueError: the port is taken or may not be used.
    """

    def __init__(self, *, rank: int, port: int) -> None:
        self.registry = CollectorRegistry()
        self._rank = rank
        self._collectors: dict[str, Gauge | Counter | Histogram] = {}
        for metric in METRICS:
            if metric.kind != "gauge" and not self._is_ignored(metric):
                self._collector(metric)
        self._server = None
        if port:
            try:
                self._server, self._thread = start_http_server(port, registry=self.registry)
            except OSError as error:
                what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
                raise ValueError(
                    f"metrics port {port} {what}; set runtime.metrics_port to a free one, or to 0 for no metrics server"
                ) from None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        if child := self._child(name, "gauge", labels):
            child.set(value)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter by `amount` ≥ 0."""
        if child := self._child(name, "counter", labels):
            child.inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count a value into a histogram."""
        if child := self._child(name, "histogram", labels):
            child.observe(value)

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _is_ignored(self, metric: Metric) -> bool:
        return self._rank != 0 and not metric.per_rank

    def _child(self, name: str, kind: str, labels: dict[str, str]) -> Gauge | Counter | Histogram | None:
        metric = BY_NAME.get(name)
        if metric is None:
            raise ValueError(f"metric {name} is not in the table METRICS of trainer/metrics.py; add it there")
        assert metric.kind == kind, f"{name} is a {metric.kind}, used as a {kind}"
        assert set(labels) == set(metric.labels), f"{name} has the labels {metric.labels}, got {tuple(labels)}"
        if self._is_ignored(metric):
            return None
        if metric.per_rank:
            labels = {**labels, "rank": str(self._rank)}
        collector = self._collector(metric)
        return collector.labels(**labels) if labels else collector

    def _collector(self, metric: Metric) -> Gauge | Counter | Histogram:
        if metric.name not in self._collectors:
            labels = (*metric.labels, "rank") if metric.per_rank else metric.labels
            name = PREFIX + metric.name
            made: Gauge | Counter | Histogram
            if metric.kind == "gauge":
                made = Gauge(name, metric.help, labels, registry=self.registry)
            elif metric.kind == "counter":
                made = Counter(name, metric.help, labels, registry=self.registry)
            else:
                made = Histogram(name, metric.help, labels, registry=self.registry, buckets=STEP_BUCKETS)
            self._collectors[metric.name] = made
        return self._collectors[metric.name]
