"""MLflow's own server takes what we send: one run of a run, also after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from trainer.recording.trackers import remote, state
from trainer.recording.trackers.base import STOPPED
from trainer.recording.trackers.remote import Remote
from trainer.spec import TrainSpec
from trainer.specbase import parse

pytestmark = pytest.mark.peers
START_SECONDS = 180  # it makes its tables first


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a database of its own."""
    pytest.importorskip("mlflow.server")
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    address = f"http://127.0.0.1:{port}"
    options = {
        "--backend-store-uri": f"sqlite:///{folder}/runs.db",
        "--artifacts-destination": str(folder),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def made_spec(run_dir: Path, server: str) -> TrainSpec:
    made = {
        "run": "micro",
        "run_dir": str(run_dir),
        "steps": 12,
        "model": {
            "vocab_size": 320,
            "hidden": 32,
            "layers": ["*-"],
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
            "mlp": {"width": 32},
        },
        "tokens": {"shards": "/s", "tokenizer": "/t", "mix": {"ko": {"weight": 1.0}}, "seq_len": 32},
        "batch": {"tokens_per_step": 256, "micro_batch_rows": 2},
        "checkpoint": {"every_steps": 4},
        "trackers": {"mlflow": {"tracking_uri": server}},
    }
    return parse(TrainSpec, made)


def test_a_run_and_its_restart_are_one_run_of_mlflow(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    spec = made_spec(tmp_path / "run", server)
    one = Remote(spec, trains=True)
    one.event("start", {"step": 0})
    for step in range(1, 9):
        one.add(step, {"train/loss": 5.0 - step / 8, "validation/bits_per_byte/en (all)": 2.0})
    one.event("end", {"state": STOPPED, "step": 8})
    one.close()
    client = MlflowClient(server)
    (experiment,) = client.search_experiments(filter_string="name = 'yaongi'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("micro", "KILLED")
    assert run.data.params["model.hidden"] == "32" and run.data.params["tokens.seq_len"] == "32"
    links = state.links(tmp_path / "run")
    assert links == {"MLflow": f"{server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"}

    two = Remote(spec, trains=True)
    two.event("restart", {"step": 4, "reason": "killed"})
    for step in range(5, 13):  # the steps after the checkpoint again
        two.add(step, {"train/loss": 5.0 - step / 8, "train/odd:name,here": 1.0})
    two.summary({"step": 12, "loss": 3.5, "report": "/runs/micro/report.html"})
    two.event("end", {"state": "finished", "step": 12})
    two.close()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted({point.step for point in points}) == list(range(1, 13))
    assert {point.step: point.value for point in points} == {step: 5.0 - step / 8 for step in range(1, 13)}
    assert run.data.metrics["summary/loss"] == 3.5
    assert run.data.tags["yaongi.report"] == "/runs/micro/report.html" and "killed" in run.data.tags["yaongi.restart"]

    remote.tell(spec, {"error": {"code": 137, "reason": "rank 0: ended by SIGKILL"}})
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED" and "ended by SIGKILL" in run.data.tags["yaongi.error"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
