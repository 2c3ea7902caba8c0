"""A step's metrics as Prometheus scrapes them while it works."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request

import pytest

from components import measuring
from components.progress import ByteProgress
from components.running import step
from trainer.specbase import SpecError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    monkeypatch.setenv("YAONGI_METRICS_PORT", str(free))
    return free


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.enable_socket
def test_a_step_serves_what_it_counts_while_it_runs(port: int) -> None:
    with step("download"):
        with ByteProgress("download ko", 100, source="ko") as progress:
            progress.advance(60)
            seen = scrape(port)
            progress.advance(40)
        measuring.written("ko", documents=3, text_bytes=90)
        later = scrape(port)
    assert seen['yaongi_stage_bytes_total{stage="download"}'] == 60
    assert seen['yaongi_download_bytes_total{source="ko"}'] == 60
    assert later['yaongi_download_bytes_total{source="ko"}'] == 100
    assert later['yaongi_documents_total{source="ko",stage="download"}'] == 3
    assert later['yaongi_text_bytes_total{source="ko",stage="download"}'] == 90
    assert abs(later['yaongi_stage_heartbeat_timestamp_seconds{stage="download"}'] - time.time()) < 60
    assert not any("job_phase" in name or "yaongi_loss" in name for name in later), "those are other processes'"
    with pytest.raises(urllib.error.URLError):
        scrape(port)


@pytest.mark.enable_socket
def test_a_launching_step_has_the_launchers_metrics_only(port: int) -> None:
    with step("train"):
        measuring.set_gauge("job_phase", 1, task="train", phase="queued")
        seen = scrape(port)
    assert seen['yaongi_job_phase{phase="queued",task="train"}'] == 1
    assert not any("download" in name for name in seen)


@pytest.mark.enable_socket
def test_each_step_begins_at_zero(port: int) -> None:
    for _ in range(2):
        with step("shards"):
            measuring.worked_through(7)
            assert scrape(port)['yaongi_stage_bytes_total{stage="shards"}'] == 7


@pytest.mark.enable_socket
def test_a_taken_port_costs_only_the_metrics(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with step("encode 1/2"):
            measuring.worked_through(7)
    said = capsys.readouterr().out
    assert f"encode: serves no metrics, as port {port} is taken" in said
    assert "✓ encode 1/2" in said


def test_port_zero_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAONGI_METRICS_PORT", "0")
    monkeypatch.setattr("trainer.exporter.start_http_server", lambda *a, **k: pytest.fail("a server was started"))
    with step("plan"):
        measuring.worked_through(1)


def test_a_port_that_is_none_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAONGI_METRICS_PORT", "9x")
    with pytest.raises(SpecError, match="YAONGI_METRICS_PORT is '9x'; give a port number"), measuring.served("plan"):
        pass
