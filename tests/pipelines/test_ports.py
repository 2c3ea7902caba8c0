"""Metrics ports that a user has set are tried before a run starts; status shows which ones it has."""

import json
import os
import socket
import time

import pytest
from ports import free_port

from manifests.spec import job_file_text, job_from
from pipelines import background, ports
from pipelines.runs.local import LocalRun
from trainer.specbase import SpecError
from trainer.thismachine import PORTS_FILE


@pytest.fixture
def busy() -> int:
    with socket.create_server(("0.0.0.0", free_port())) as server:
        yield server.getsockname()[1]


def job(port: int):
    return job_from({"preset": "tiny", "cluster": {"nodes": 2}}, {"train": {"runtime": {"metrics_port": port}}})


@pytest.mark.enable_socket
@pytest.mark.parametrize("rank", [0, 1])
def test_a_named_port_that_is_taken_is_refused(busy, rank):
    with pytest.raises(SpecError, match=rf"train.runtime.metrics_port {busy - rank}: port {busy} is taken"):
        ports.refuse_taken(job(busy - rank), {})


@pytest.mark.enable_socket
def test_the_default_port_may_be_taken_unless_it_is_named(busy, monkeypatch):
    monkeypatch.setattr(ports, "DEFAULT_PORT", busy)
    ports.refuse_taken(job(busy), {"train": {"steps": 3}})
    with pytest.raises(SpecError, match="is taken"):
        ports.refuse_taken(job(busy), {"train": {"runtime": {"metrics_port": busy}}})


@pytest.mark.enable_socket
def test_the_default_port_in_a_persons_job_file_is_a_named_one(busy, monkeypatch, tmp_path):
    monkeypatch.setattr(ports, "DEFAULT_PORT", busy)
    file = tmp_path / "job.yaml"
    file.write_text(f"preset: tiny\ntrain: {{runtime: {{metrics_port: {busy}}}}}\n")
    with pytest.raises(SpecError, match=f"port {busy} is taken"):
        ports.refuse_taken(job(busy), ports.written(str(file), {"train": {"steps": 3}}))
    ports.refuse_taken(job(busy), ports.written("tiny", {}))
    file.write_bytes(job_file_text(job(busy)))
    ports.refuse_taken(job(busy), ports.written(str(file), {}))


@pytest.mark.enable_socket
def test_the_steps_port_of_the_environment_is_refused_too(busy, monkeypatch):
    monkeypatch.setenv("YAONGI_METRICS_PORT", str(busy))
    with pytest.raises(SpecError, match=f"YAONGI_METRICS_PORT {busy}: the port is taken"):
        ports.refuse_taken(job(0), {})


@pytest.mark.enable_socket
@pytest.mark.parametrize("verb", ["run", "local"])
def test_a_run_with_a_taken_port_ends_before_its_first_step(busy, yaongi, monkeypatch, tmp_path, verb):
    monkeypatch.setattr(ports, "DEFAULT_PORT", busy)
    file = tmp_path / "named.yaml"
    file.write_text(f"preset: tiny\ntrain: {{runtime: {{metrics_port: {busy}}}}}\n")
    code, out, err = yaongi(verb, str(file))
    assert code == 2 and f"port {busy} is taken" in err
    assert "▶" not in out and not os.path.exists("work/checkpoints")


def test_status_says_where_a_living_run_is_scraped(tmp_path):
    spec = job_from({"preset": "tiny", "storage": {"checkpoints_dir": str(tmp_path / "checkpoints")}})
    run = LocalRun(spec.run_name, tmp_path / "checkpoints" / "runs" / spec.run_name, tmp_path)
    run.directory.mkdir(parents=True)
    (run.directory / PORTS_FILE).write_text(json.dumps({"ports": [9401, 9402]}))
    with background.driving(spec, tmp_path):
        (run.directory / PORTS_FILE).touch()
        assert dict(run.view().rows)["metrics"] == "rank 0: port 9401, rank 1: port 9402"
        (tmp_path / "logs").mkdir()
        log = tmp_path / "logs" / f"{run.name}-1.log"
        log.write_text("    ▶ plan\n    metrics of the steps: port 9391, as 9390 is taken\n")
        assert dict(run.view().rows)["metrics"].endswith("steps: port 9391, as 9390 is taken")
        long_ago = time.time() - 100
        for file in (log, run.directory / PORTS_FILE):
            os.utime(file, (long_ago, long_ago))
        assert "metrics" not in dict(run.view().rows), "they are of an earlier start"
