"""Exports the metrics of one process: a registry built from the table METRICS, and a small HTTP server thread."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    make_wsgi_app,
    start_http_server,
)

from trainer.errors import SpecError
from trainer.recording.metrics import BY_NAME, METRICS, PREFIX, Metric, Process

disable_created_metrics()  # an additional, useless series for each counter
MOST_TRIES, LAST_PORT = 64, 65535
Collector = TypeVar("Collector", Gauge, Counter, Histogram)
LONGEST_INTERVAL = 60.0  # seconds between scrapes; Prometheus's own default
LATE_SECONDS = 2.0  # so late comes a scraper with a short interval on a busy machine


class Metrics:
    """The metrics of one process.

    Gauges appear when they are first set (an unset one would wrongly read 0); counters without labels start at 0.

    Args:
        rank: rank of this process; ranks other than 0 export only the `per_rank` metrics and ignore the others.
        port: port for /metrics (on all interfaces); 0 serves nothing.
        stride: 0 uses only this port. Otherwise, if it is taken, the port `stride` higher is tried, and so on, so that
            processes with neighbouring ports never try the same one; `port` has the result.
        process: metrics of other processes are ignored.
        setting: what sets the port, for the message of the error.

    Raises:
        SpecError: the port (with a stride, each one tried) is taken or not allowed.
    """

    def __init__(
        self,
        *,
        rank: int,
        port: int,
        stride: int = 0,
        process: Process = "trainer",
        setting: str = "train.runtime.metrics_port",
    ) -> None:
        self.registry = CollectorRegistry()
        self._rank, self._process, self._setting = rank, process, setting
        self._collectors: dict[str, Gauge | Counter | Histogram] = {}
        for metric in METRICS:
            # Labelled metrics have no value before a label is given; creating them now avoids a race between threads.
            if (metric.kind != "gauge" or metric.labels) and not self._is_ignored(metric):
                self._collector(metric)
        self._server: WSGIServer | None = None
        self._scrapes = _Scrapes(make_wsgi_app(self.registry))
        self.port = 0
        if port:
            self._serve(range(port, LAST_PORT + 1, stride)[:MOST_TRIES] if stride else [port])

    def _serve(self, ports: Sequence[int]) -> None:
        for port in ports:
            try:
                server, self._thread = start_http_server(port, registry=self.registry)
                server.set_app(self._scrapes)
                self._server = server
                self.port = port
                return
            except OSError as error:
                if error.errno == errno.EADDRINUSE and port != ports[-1]:
                    continue
                what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
                raise SpecError(
                    f"metrics port {port} {what}; set {self._setting} to a free one, or to 0 for no metrics server"
                ) from None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        if child := self._child(name, Gauge, labels):
            child.set(value)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Increment a counter by `amount` ≥ 0."""
        if child := self._child(name, Counter, labels):
            child.inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Record a value in a histogram."""
        if child := self._child(name, Histogram, labels):
            child.observe(value)

    def await_scrape(self) -> None:
        """Return when all regular scrapers of this process have its current values, or are overdue.

        Otherwise Prometheus would never get the last values of a process. It does not wait for a scraper that came less
        than twice or comes less than once a minute.
        """
        now = time.monotonic()
        while self._server is not None and self._scrapes.are_due(now):
            time.sleep(0.02)

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _is_ignored(self, metric: Metric) -> bool:
        return self._process not in metric.processes or (self._rank != 0 and not metric.per_rank)

    def _child(self, name: str, kind: type[Collector], labels: dict[str, str]) -> Collector | None:
        metric = BY_NAME.get(name)
        if metric is None:
            raise ValueError(f"metric {name} is not in the table METRICS of trainer/recording/metrics.py; add it there")
        assert set(labels) == set(metric.labels), f"{name} has the labels {metric.labels}, got {tuple(labels)}"
        if self._is_ignored(metric):
            return None
        if metric.per_rank:
            labels = {**labels, "rank": str(self._rank)}
        collector = self._collector(metric)
        child = collector.labels(**labels) if labels else collector
        assert isinstance(child, kind), f"{name} is a {metric.kind}, used as a {kind.__name__}"
        return child

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
                made = Histogram(name, metric.help, labels, registry=self.registry, buckets=metric.buckets)
            self._collectors[metric.name] = made
        return self._collectors[metric.name]


class _Scrapes:
    """The WSGI application `app`, with a record of each scraper's last answer."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        # Address → time of its last request, seconds since the one before.
        self._asked: dict[str, tuple[float, float]] = {}
        self._answered: dict[str, float] = {}  # → time of the last request that was answered

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        address, asked = environ["REMOTE_ADDR"], time.monotonic()
        before, _ = self._asked.get(address, (-float("inf"), 0.0))
        self._asked[address] = asked, asked - before
        body = self._app(environ, start_response)
        return _Answer(body, lambda: self._answered.update({address: asked}))

    def are_due(self, since: float) -> bool:
        """Whether a regular scraper is still expected, or waits, for an answer to a request after `since`."""
        now = time.monotonic()
        return any(
            self._answered.get(address, 0.0) < since
            and interval <= LONGEST_INTERVAL
            and now < asked + 1.2 * interval + LATE_SECONDS
            for address, (asked, interval) in list(self._asked.items())
        )


class _Answer(list[bytes]):
    """The body of a response; the server closes it after the last byte was sent."""

    def __init__(self, body: Iterable[bytes], sent: Callable[[], None]) -> None:
        super().__init__(body)
        self.close = sent
