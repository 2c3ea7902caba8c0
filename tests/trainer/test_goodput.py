"""Where the time of a run went: the classes sum to its wall time, whatever happened to its processes."""

import json

import micro
import pytest
import torch

from trainer.distributed import World
from trainer.recording import goodput, recorder
from trainer.recording.goodput import Ledger, account, read, restarts_of
from trainer.spec import BackendsSpec


def lines(steps, seconds=2.0):
    return [{"step": step, "seconds": seconds} for step in steps]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets; the first process of the run is started at 1000."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])

    def add(seconds):
        now[0] += seconds
        return now[0]

    return add


def train(ledger, clock, steps):
    """Steps of 0.5 s of waiting, 1.5 s of work and 0.25 s of writing lines."""
    for step in steps:
        for name, seconds in (("data_wait", 0.5), ("step", 1.5)):
            clock(seconds)
            ledger.add(name, seconds)
        clock(0.25)
        ledger.write(step)


def test_a_killed_and_a_stopped_process(tmp_path, clock):
    """Counted by hand: starts 5 s after the entrypoint; checkpoint of step 4; killed in step 9; 30 s without any."""
    first = Ledger(tmp_path, clock(5), 0, [], {})
    clock(7)
    train(first, clock, range(1, 5))
    clock(3)
    first.add("checkpoint", 3)
    first.write(4, at_once=True)
    train(first, clock, range(5, 9))
    clock(0.5 + 30)  # half a second of step 9
    second = Ledger(tmp_path, clock(0), 4, lines(range(5, 9)), {"killed": 1})
    second.write(4, at_once=True)
    clock(6)
    train(second, clock, range(5, 11))
    second.write(10, at_once=True)
    ended = clock(0)

    found = account(read(tmp_path), lines(range(1, 11)), 1000.0)
    assert sum(found.values()) == pytest.approx(ended - 1000, abs=1e-9)
    # Work of 18 steps of which 4 were lost, 8 s in all; of this a quarter was waiting, as of every step.
    assert found["lost"] == pytest.approx(8)
    assert found["step"] == pytest.approx(1.5 * 10) and found["data_wait"] == pytest.approx(0.5 * 10)
    assert found["startup"] == pytest.approx(5 + 7 + 6) and found["checkpoint"] == pytest.approx(3)
    assert found["other"] + found["down"] == pytest.approx(0.25 * 14 + 30.5)
    (restart,) = restarts_of(read(tmp_path))
    assert (restart.reason, restart.from_step, restart.lost) == ("killed", 4, 8)
    assert restart.reached == 8 and 29 < restart.down < 32


def test_steps_after_the_last_write_of_a_killed_process_count_as_lost(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(goodput, "WRITE_SECONDS", 1e9)
    first = Ledger(tmp_path, clock(0), 0, [], {})
    first.write(0, at_once=True)
    train(first, clock, range(1, 4))
    second = Ledger(tmp_path, clock(10), 0, lines(range(1, 4)), {"killed": 1})
    second.write(0, at_once=True)
    found = account(read(tmp_path), [], 1000.0)
    assert found["lost"] == pytest.approx(6) and found.get("step", 0) == pytest.approx(0)
    assert sum(found.values()) == pytest.approx(clock(0) - 1000)


def test_a_run_that_an_earlier_version_began(tmp_path, clock):
    """It recorded only the seconds of its steps; the rest of its time is not known."""
    ledger = Ledger(tmp_path, clock(100), 20, lines(range(21, 24)), {"terminated": 1})
    clock(5)
    train(ledger, clock, range(21, 26))
    ledger.write(25, at_once=True)
    found = account(read(tmp_path), lines(range(1, 26)), 1000.0)
    assert found["unknown"] == pytest.approx(100 - 40 - 6) and found["lost"] == pytest.approx(6)
    assert found["step"] == pytest.approx(40 + 7.5)
    assert sum(found.values()) == pytest.approx(clock(0) - 1000)


def test_a_run_of_an_earlier_version():
    assert account([], lines(range(1, 11)), 1000.0, recorded=25.0) == {"step": 20.0, "unknown": 5.0}
    assert account([], [], None) == {}


def test_a_damaged_file_costs_only_what_it_held(tmp_path, caplog):
    (tmp_path / goodput.GOODPUT).write_text('{"processes": [{"started": "x"}]}')
    assert read(tmp_path) == []
    assert "where earlier time went is unknown" in caplog.text


def test_a_full_disk_does_not_end_a_run(tmp_path, caplog):
    ledger = Ledger(tmp_path / "nowhere", 1.0, 0, [], {})
    for _ in range(2):
        ledger.write(1, at_once=True)
    assert caplog.text.count("cannot be written") == 1


def test_it_is_what_prometheus_counts(micro_data, tmp_path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", runtime={"metrics_port": 0})
    (tmp_path / "run").mkdir()
    began = goodput.time.time()
    recording = recorder.Recorder(spec, World(0, 1, 0, 1, torch.device("cpu"), None, None), began)
    recording.begin(None, dict.fromkeys(("device", "mesh", "precision", *BackendsSpec.model_fields), "x"))
    for phase in ("data", "forward_backward", "optimizer", "checkpoint"):
        with recording.phase(phase):
            goodput.time.sleep(0.02)
    recording.close()
    found = account(read(spec.run_dir), [], None)
    for name in ("step", "data_wait", "checkpoint"):
        counted = recording.metrics.registry.get_sample_value("yaongi_goodput_seconds_total", {"class": name})
        assert found[name] == pytest.approx(counted)
    (process,) = json.loads((tmp_path / "run" / goodput.GOODPUT).read_text())["processes"]
    assert sum(found.values()) == pytest.approx(process["until"] - began)
    assert 0.08 < sum(found.values()) <= goodput.time.time() - began
