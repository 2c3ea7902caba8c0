"""A step's metrics as Prometheus scrapes them while it works."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from raw_cases import small_job, write_raw
from waiting import wait_until

from components import measuring
from components.download.retry import retried
from components.hygiene import step as hygiene
from components.launch.lease import held
from components.launch.phases import PhaseMetrics
from components.progress import ByteProgress
from components.running import step
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from trainer.data.manifest import read_manifest
from trainer.specbase import SpecError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    free = free_port()
    monkeypatch.setenv("YAONGI_METRICS_PORT", str(free))
    return free


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
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


class Clock:
    """Replaces the module `time` of the exporter, so that a busy machine has no influence."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("trainer.recording.exporter.time", made)
    return made


@pytest.mark.enable_socket
def test_a_regular_scraper_gets_the_last_counts(port: int, clock: Clock) -> None:
    last: list[dict[str, float]] = []
    with step("shards"):
        for _ in range(2):
            scrape(port)
            clock.now += 30
        measuring.worked_through(7)
        scraper = threading.Timer(0.3, lambda: last.append(scrape(port)))
        scraper.start()
    scraper.join()
    assert last[0]['yaongi_stage_bytes_total{stage="shards"}'] == 7


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("scrapes", "seconds_apart", "seconds_after"),
    [
        pytest.param(0, 30, 0, id="nobody came"),
        pytest.param(1, 30, 0, id="once, so nobody knows when again"),
        pytest.param(2, 61, 0, id="too seldom"),
        pytest.param(2, 30, 39, id="overdue"),
    ],
)
@pytest.mark.timeout(60)
def test_a_step_does_not_wait_for(
    port: int, clock: Clock, scrapes: int, seconds_apart: float, seconds_after: float
) -> None:
    with step("shards"):
        for _ in range(scrapes):
            clock.now += seconds_apart
            scrape(port)
        clock.now += seconds_after
    # The clock stands still, so it would wait forever.


@pytest.mark.enable_socket
@pytest.mark.timeout(60)
def test_a_step_that_fails_ends_at_once(port: int, clock: Clock) -> None:
    with pytest.raises(SystemExit), step("shards"):
        for _ in range(2):
            clock.now += 30
            scrape(port)
        raise ValueError("no room")


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


@pytest.mark.enable_socket
def test_the_default_port_gives_way_to_the_next_free_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = free_port()
    monkeypatch.delenv("YAONGI_METRICS_PORT", raising=False)
    monkeypatch.setattr(measuring, "STEP_METRICS_PORT", usual)
    with socket.create_server(("0.0.0.0", usual)), step("shards"):
        said = capsys.readouterr().out.splitlines()[1]
        assert said.endswith(f", as {usual} is taken")
        port = int(said.removeprefix("metrics of the steps: port ").partition(",")[0])
        measuring.worked_through(7)
        assert usual < port and scrape(port)['yaongi_stage_bytes_total{stage="shards"}'] == 7


def test_port_zero_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAONGI_METRICS_PORT", "0")
    monkeypatch.setattr(
        "trainer.recording.exporter.start_http_server", lambda *a, **k: pytest.fail("a server was started")
    )
    with step("plan"):
        measuring.worked_through(1)


def test_a_port_that_is_none_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAONGI_METRICS_PORT", "9x")
    with pytest.raises(SpecError, match="YAONGI_METRICS_PORT is '9x'; give a port number"), measuring.served("plan"):
        pass


@pytest.mark.enable_socket
def test_what_the_data_steps_count_is_what_their_manifests_say(port: int, tmp_path: Path) -> None:
    job = small_job(tmp_path, {"hygiene": {"exact_duplicates": True}})
    raw = write_raw(job, documents=40)
    with step("hygiene"):
        kept = hygiene.run(job, raw)
        dropped = scrape(port)
    with step("tokenizer"):
        trained = tokenizer.run(job, kept)
    with step("shards"):
        made = shards.run(job, kept, trained)
        written = scrape(port)
    manifest = read_manifest(made.path)
    for source in job.data.sources:
        of_source = f'source="{source}"'
        assert written[f'yaongi_documents_total{{{of_source},stage="shards"}}'] == manifest.counts(source).documents
        for split in ("train", "heldout"):
            tokens = manifest.counts(source, split).tokens
            assert written.get(f'yaongi_shard_tokens_total{{{of_source},split="{split}"}}', 0) == tokens
    assert dropped['yaongi_left_out_documents_total{filter="exact_duplicates"}'] == kept.summary["left_out_documents"]
    assert dropped['yaongi_stage_bytes_total{stage="hygiene"}'] == sum(
        one.bytes for one in read_manifest(raw.path).files
    )
    with step("shards"):
        shards.run(job, kept, trained)
        again = scrape(port)
    assert again['yaongi_files_verified_total{stage="shards"}'] == len(manifest.files)
    assert not any("shard_tokens" in name for name in again), "nothing was written"


@pytest.mark.enable_socket
def test_the_phases_of_a_job_add_up_to_the_time_it_was_followed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("components.launch.phases.time.monotonic", lambda: now)
    with step("train"):
        phases = PhaseMetrics("train")
        for phase, seconds in (("queued", 5), ("queued", 7), ("starting", 3), ("running", 60), ("running", 0)):
            phases.tick(phase)
            now += seconds
        phases.restarted()
        seen = scrape(port)
    of_phase = 'phase="{}",task="train"'.format
    spent = {p: seen[f"yaongi_job_phase_seconds_total{{{of_phase(p)}}}"] for p in ("queued", "starting", "running")}
    assert spent == {"queued": 12, "starting": 3, "running": 60}
    assert {p: seen[f"yaongi_job_phase{{{of_phase(p)}}}"] for p in spent} == {"queued": 0, "starting": 0, "running": 1}
    assert seen['yaongi_job_pod_restarts_total{task="train"}'] == 1


@pytest.mark.enable_socket
def test_renewals_of_the_lease_are_counted_by_outcome(port: int, tmp_path: Path) -> None:
    with step("train"), held(tmp_path / "run", lease_seconds=60, renewal_seconds=0.05):
        at_first = renewals(port, "failed")
        wait_until(lambda: renewals(port, "renewed") >= 1)
        (tmp_path / "run").rename(tmp_path / "away")  # the volume is gone
        wait_until(lambda: renewals(port, "failed") >= 1)
        (tmp_path / "away").rename(tmp_path / "run")
    assert at_first == 0


def renewals(port: int, outcome: str) -> float:
    return scrape(port)[f'yaongi_lease_renewals_total{{outcome="{outcome}"}}']


@pytest.mark.enable_socket
def test_repeated_requests_are_counted(port: int) -> None:
    answers = iter([TimeoutError(), TimeoutError(), "text"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with step("download"):
        assert retried("texts", ask, lambda error: isinstance(error, TimeoutError), 5, 0.01, 0.02) == "text"
        seen = scrape(port)
    assert seen["yaongi_download_retries_total"] == 2
