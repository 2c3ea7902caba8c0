"""A run that was killed, stopped and started again repeats an undisturbed one bit for bit.

Tests that kill or stop ranks use real processes; in the others ranks are forks (tests/trainer/forked.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import micro
import pytest
import torch

from trainer.checkpoints import checkpoint
from trainer.checkpoints.index import Reader
from trainer.exitcodes import ExitCode
from trainer.spec import TrainSpec

pytestmark = pytest.mark.timeout(
    1200
)  # mostly imports, by up to three processes at a time, on whatever cores there are
# Ranks that sum in another order drift apart in proportion to Muon's rate (tests/trainer/test_parallel.py).
RATES = {"muon": {"learning_rate": 1e-4}, "adamw": {"learning_rate": 1e-4}}
EVERYTHING = {"checkpoint": {"keep_last": 9}, "steps": 24, "optimizer": RATES}


@pytest.fixture(scope="module")
def undisturbed(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """Two ranks, 24 steps, all checkpoints kept."""
    spec = micro.micro_spec(micro_data, tmp_path_factory.mktemp("runs") / "undisturbed", **EVERYTHING)
    forked.done(forked.train(spec, 2))
    return spec


def losses(spec: TrainSpec) -> list[tuple[int, str]]:
    return [(line["step"], repr(line["loss"])) for line in micro.metrics(spec)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by torch's own reader."""
    index = Reader(path).read_metadata().state_dict_metadata
    loaded = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in index.items()}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=path, no_dist=True)
    return loaded


def wait_for_step(spec: TrainSpec, step: int, process: subprocess.Popen) -> None:
    file = Path(spec.run_dir) / "logs" / "metrics.jsonl"
    for _ in range(15_000):
        if file.exists() and any(line["step"] >= step for line in micro.metrics(spec)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Pids of the ranks that an entrypoint has started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return [int(pid) for pid in listed if b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_killed_and_stopped_run_equals_undisturbed_one(undisturbed: TrainSpec, micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "disturbed", **EVERYTHING)

    # Held at a step that they pass only when asked to stop: on no machine have they ended before that.
    killed = micro.start(spec, ranks=2, fault="hold 20")
    wait_for_step(spec, 5, killed)
    while not checkpoint.latest_step(spec.run_dir):
        time.sleep(0.02)
    for pid in [*ranks_of(killed), killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    published, reached = checkpoint.latest_step(spec.run_dir), micro.metrics(spec)[-1]["step"]

    stopped = micro.start(spec, ranks=2, fault="hold 22")
    wait_for_step(spec, reached + 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    code, output = micro.finish(stopped)
    assert code == ExitCode.TERMINATED, output
    assert f"resuming from the checkpoint of step {published}" in output, f"killed after step {reached}: {output}"
    saved = checkpoint.latest_step(spec.run_dir)
    assert saved >= reached + 2 and micro.metrics(spec)[-1]["step"] == saved, "SIGTERM saves the step it stopped at"

    code, output = micro.finish(micro.start(spec, ranks=2))
    assert code == 0, output
    assert f"resuming from the checkpoint of step {saved}" in output
    assert losses(spec) == losses(undisturbed)

    ours, theirs = (checkpoint.latest(each.run_dir) for each in (spec, undisturbed))
    assert ours is not None and theirs is not None and ours.name == theirs.name == "step-00000024"
    expected = tensors(theirs)
    found = tensors(ours)
    assert found.keys() == expected.keys() and any(key.startswith("optimizer.muon") for key in found)
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not different
    assert checkpoint.read_manifest(ours).cursor == checkpoint.read_manifest(theirs).cursor

    result = json.loads((Path(spec.run_dir) / "result.json").read_text())
    assert result["steps"] == 24 and result["restarts"] == 2
    assert result["checkpoint_digest"] == checkpoint.read_manifest(ours).digest


def test_world_size_may_change_on_the_way(undisturbed: TrainSpec, micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", **EVERYTHING)
    target = checkpoint.step_dir(spec.run_dir, 4)
    shutil.copytree(checkpoint.step_dir(undisturbed.run_dir, 4), target)
    (output,) = forked.done(forked.train(spec, 1))
    assert "resuming from the checkpoint of step 4, saved by 2 ranks" in output
    two = {line["step"]: line for line in micro.metrics(undisturbed)}
    one = micro.metrics(spec)
    assert [line["step"] for line in one] == list(range(5, 25))
    for line in one[:10]:  # later on, a rounding error may send a token to another expert
        assert line["loss"] == pytest.approx(two[line["step"]]["loss"], rel=1e-5)
        assert line["by_source"] == two[line["step"]]["by_source"]


def test_a_killed_rank_costs_the_other_one_line(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=400)
    process = micro.start(spec, ranks=2)
    wait_for_step(spec, 2, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    code, output = micro.finish(process)
    assert code == ExitCode.KILLED and "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith(("error ", "exit "))]
    assert [int(line.split()[1]) for line in lines] == [ExitCode.COMMUNICATION, ExitCode.KILLED], output
    logs = [file.read_text(encoding="utf-8") for file in (Path(spec.run_dir) / "logs").glob("rank-*.log")]
    assert sum("Traceback (most recent call last)" in log for log in logs) == 1


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    undisturbed: TrainSpec, micro_data: Path, tmp_path: Path
):
    spec = micro.micro_spec(micro_data, tmp_path / "run", **EVERYTHING)
    steps = [checkpoint.step_dir(spec.run_dir, step) for step in (20, 24)]
    for path in steps:
        shutil.copytree(checkpoint.step_dir(undisturbed.run_dir, int(path.name[-8:])), path)
    damage(steps[1])
    output = "".join(forked.done(forked.train(spec, 2)))
    assert "Traceback" not in output, output
    assert f"resuming from {steps[0]} instead of step-00000024" in output
    assert "resuming from the checkpoint of step 20" in output
    assert losses(spec) == losses(undisturbed)[20:]

    for path in checkpoint.published(spec.run_dir):
        damage(path)
    for code, output in forked.train(spec, 2):
        assert code == ExitCode.CHECKPOINT and "Traceback" not in output, output
        assert "none of 2 checkpoints verifies" in output


def damage(path: Path) -> None:
    """Change one byte of what the second rank has written; where all ranks look, one of them finds it."""
    file = sorted(path.glob("__1_*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
