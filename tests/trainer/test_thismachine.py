"""Ranks and ports that depend on the machine on which a user starts a run, with simulated numbers of GPUs."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import micro
import pytest
import torch
from ports import free_port

from trainer import entrypoint, thismachine
from trainer.distributed import World
from trainer.recording.exporter import Metrics
from trainer.recording.recorder import Recorder
from trainer.runtimespec import RuntimeSpec
from trainer.spec import BackendsSpec


@contextmanager
def taken(*ports: int) -> Iterator[None]:
    sockets = [socket.create_server(("0.0.0.0", port)) for port in ports]
    try:
        yield
    finally:
        for each in sockets:
            each.close()


@pytest.mark.parametrize(
    ("wanted", "gpus", "changes", "started"),
    [
        pytest.param(2, 0, {}, 2, id="a CPU takes what the job says"),
        pytest.param(2, 1, {}, 1, id="one GPU"),
        pytest.param(2, 8, {}, 2, id="no more than the job says"),
        pytest.param(4, 3, {}, 2, id="three cannot share a step of four micro-batches"),
        pytest.param(4, 2, {"parallel": {"expert": 2}}, 2, id="experts over two ranks"),
        pytest.param(4, 3, {"parallel": {"expert": 4}}, 3, id="nothing fits, which the ranks will say"),
    ],
)
def test_ranks_are_those_of_the_job_as_far_as_there_are_gpus(tmp_path, wanted, gpus, changes, started):
    spec = micro.micro_spec(tmp_path, tmp_path, **changes)
    assert thismachine.ranks(spec, wanted, gpus) == started


@pytest.mark.parametrize(
    ("here", "device", "gpus", "started"),
    [(True, "auto", 1, "1"), (True, "auto", 0, "2"), (True, "cpu", 1, "2"), (False, "auto", 1, "2")],
)
def test_a_pod_starts_what_it_was_told(tmp_path, monkeypatch, here, device, gpus, started):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setattr(entrypoint, "_gpus", lambda: gpus)
    if here:
        monkeypatch.setenv(thismachine.VARIABLE, "1")
    else:
        monkeypatch.delenv(thismachine.VARIABLE, raising=False)
    spec = micro.micro_spec(tmp_path, tmp_path)
    entrypoint.fit_ranks(spec.updated({"runtime": {"device": device}}))
    assert entrypoint.os.environ["PET_NPROC_PER_NODE"] == started


@pytest.mark.enable_socket
def test_a_taken_port_is_passed_over_in_strides_that_leave_the_other_ranks_theirs():
    first = free_port()
    with taken(first, first + 2):
        metrics = Metrics(rank=0, port=first, stride=2)
        assert metrics.port == first + 4
        metrics.close()


@pytest.mark.enable_socket
def test_the_default_port_gives_way_here_and_the_run_directory_says_to_which(tmp_path, monkeypatch):
    monkeypatch.setenv(thismachine.VARIABLE, "1")
    monkeypatch.setattr(thismachine, "DEFAULT_PORT", free_port())
    port = thismachine.DEFAULT_PORT
    spec = micro.micro_spec(tmp_path, tmp_path / "run").updated({"runtime": {"metrics_port": port}})
    Path(spec.run_dir).mkdir()
    with taken(port):
        recorder = Recorder(spec, World(0, 1, 0, 1, torch.device("cpu"), None, None), 0.0)
        recorder.begin(None, dict.fromkeys(("device", "precision", "mesh", *BackendsSpec.model_fields), "x"))
        recorder.close()
    assert recorder.metrics.port > port
    assert json.loads((tmp_path / "run" / thismachine.PORTS_FILE).read_text()) == {"ports": [recorder.metrics.port]}


@pytest.mark.parametrize(("here", "named"), [(True, True), (False, False)])
@pytest.mark.enable_socket
def test_a_port_that_was_named_or_is_a_pod_s_does_not_give_way(tmp_path, monkeypatch, here, named):
    port = free_port()
    monkeypatch.setattr(thismachine, "DEFAULT_PORT", RuntimeSpec().metrics_port if named else port)
    monkeypatch.setenv(thismachine.VARIABLE, "1")
    if not here:
        monkeypatch.delenv(thismachine.VARIABLE)
    spec = micro.micro_spec(tmp_path, tmp_path).updated({"runtime": {"metrics_port": port}})
    with taken(port), pytest.raises(ValueError, match=f"metrics port {port} is taken"):
        Recorder(spec, World(0, 1, 0, 1, torch.device("cpu"), None, None), 0.0)
