"""A run by Megatron-LM from the entrypoint to the run's checkpoint; a stand-in for its program needs no GPU."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import made_run
import micro
import pytest
import torch
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from pipelines.runs import standing
from trainer import entrypoint
from trainer.checkpoints import checkpoint
from trainer.errors import DivergedError, SpecError
from trainer.exitcodes import ExitCode
from trainer.megatron.program import find_program
from trainer.megatron.relay import Tee
from trainer.megatron.train import run
from trainer.spec import TrainSpec
from trainer.trained import load_trained

STAND_IN = Path(__file__).with_name("megatron_stand_in")
MODEL = {
    "layers": ["*E", "*E"],
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 10000.0, "qk_norm": True},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 16, "scores": "softmax", "activation": "swiglu"},
    "mamba": None,
    "mlp": None,
    "engram": [],
}
BALANCE = {"bias_update_rate": 0.0, "sequence_loss_weight": 0.0, "balance_loss_weight": 0.01, "score_scale": 1.0}
MODEL["moe"] = {**MODEL["moe"], **BALANCE}  # type: ignore[dict-item]  # a mapping above
STEPS = 7


def megatron_spec(base: TrainSpec, data: Path, directory: Path, **changes: object) -> TrainSpec:
    return micro.micro_spec(
        data,
        directory,
        **{
            "engine": "megatron",
            "model": MODEL,
            "init_from": base.run_dir,
            "optimizer": {"name": "adamw", "spike_guard": None},
            "steps": STEPS,
            "checkpoint": {"every_steps": 4},
            **changes,
        },
    )


def start(spec: TrainSpec, fault: str = "") -> subprocess.Popen:
    file = micro.write_spec(spec, Path(spec.run_dir).with_suffix(".yaml"))
    path = os.pathsep.join([str(STAND_IN), *sys.path])
    environment = micro.environment(PET_NPROC_PER_NODE="2", FAULT=fault, PYTHONPATH=path)
    command = [sys.executable, "-m", "trainer.entrypoint", "--spec", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(spec: TrainSpec) -> list[dict]:
    file = Path(spec.run_dir) / "logs" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_with_a_checkpoint_of_ours(tmp_path: Path):
    base, model = made_run.make_run(tmp_path / "base", model=MODEL)
    spec = megatron_spec(base, tmp_path / "base" / "data", tmp_path / "run")
    stopped = start(spec, "slow")
    deadline = time.monotonic() + 200
    while not lines(spec) and time.monotonic() < deadline and stopped.poll() is None:
        time.sleep(0.2)
    stopped.send_signal(signal.SIGTERM)
    code, output = micro.finish(stopped)
    reached = checkpoint.megatron_step(spec.run_dir)
    assert code == ExitCode.TERMINATED and 0 < reached < STEPS, output
    assert f"the newest checkpoint is of step {reached}" in output
    shown = standing.of_directory(Path(spec.run_dir))
    assert (shown.checkpoint_step, shown.step) == (reached, reached)

    code, output = micro.finish(start(spec))
    assert code == 0, output
    assert f"resuming from Megatron's checkpoint of step {reached}" in output
    assert "precision: bf16, as FP8 cannot be had: there is no GPU" in output
    records = lines(spec)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] == pytest.approx(6 - 0.1 * STEPS) and records[-1]["learning_rate"] == 3e-4
    assert records[-1]["auxiliary"] == {"router_balance": pytest.approx(1.02 * 0.01 * 2)}  # of two layers
    assert records[-1]["tokens_per_second"] == micro.TOKENS_PER_STEP / 0.05
    assert sum(records[-1]["by_source"].values()) == STEPS * micro.TOKENS_PER_STEP
    assert records[-1]["clipped"] and records[-1]["expert_load_max_ratio"] is None
    result = json.loads((Path(spec.run_dir) / "result.json").read_text())
    assert (result["steps"], result["world_size"], result["tokens"]) == (STEPS, 2, STEPS * micro.TOKENS_PER_STEP)
    made = checkpoint.latest(spec.run_dir)
    assert made is not None and checkpoint.step_of(made) == STEPS
    found, wanted = load_trained(spec, torch.device("cpu")).model.state_dict(), model.state_dict()
    for name, tensor in wanted.items():  # the weights that it began with, in BF16 except the bias on the choice
        given = tensor if name.endswith("bias_E") else tensor.to(torch.bfloat16).float()
        torch.testing.assert_close(found[name], given, rtol=0, atol=0)
    kept = {folder.name for folder in (Path(spec.run_dir) / "megatron").glob("iter_*")}
    assert f"iter_{STEPS:07d}" in kept


class Nobody:
    """A relay without other ranks."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def program(directory: Path, text: str) -> Path:
    file = directory / "pretrain_gpt.py"
    file.write_text(text)
    return file


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` changes both, as it owns its process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_program_gets_its_arguments_and_its_lines_are_read(tmp_path: Path, leave_no_traces: None):
    relay = Nobody()
    file = program(tmp_path, "import sys\nprint('a', *sys.argv[1:])\nprint('b', end='')\nprint('c')\n")
    assert run(file, ["--lr", "0.1"], relay) == 0  # type: ignore[arg-type]  # all that it uses of a relay
    assert relay.lines == ["a --lr 0.1", "bc"]


@pytest.mark.parametrize(
    ("text", "raised", "said"),
    [
        ("raise RuntimeError('Rank 3: Unexpected result nan (message=...)')", DivergedError, "Unexpected result nan"),
        ("import argparse; argparse.ArgumentParser().parse_args()", SpecError, "refused an argument"),
        ("import sys; sys.exit(17)", RuntimeError, "exit code 17"),
        ("assert False, 'x'", AssertionError, "x"),
        ("assert False, 'Megatron requires CUDA.'", SpecError, "needs a GPU"),
        ("assert False, 'no samples left to consume: 96, 64'", SpecError, "every_steps null"),
    ],
)
def test_its_ends_become_ours(text: str, raised: type[Exception], said: str, tmp_path: Path, leave_no_traces: None):
    with pytest.raises(raised, match=said):
        run(program(tmp_path, text), ["--nonsense"], Nobody())  # type: ignore[arg-type]  # as above


def test_an_end_before_the_last_step_is_a_stop_and_says_by_what(tmp_path: Path, leave_no_traces: None):
    ends = program(tmp_path, "import sys; sys.exit(0)")
    assert run(ends, [], Nobody()) == ExitCode.TERMINATED  # type: ignore[arg-type]  # as above
    # Ctrl-C reaches Megatron as the signal that it knows.
    text = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    assert run(program(tmp_path, text), [], Nobody()) == ExitCode.INTERRUPTED  # type: ignore[arg-type]  # as above


def test_without_megatron_the_fix_is_said():
    with pytest.raises(SpecError, match=r"docker/megatron\.Dockerfile"):
        find_program()


def test_a_tee_passes_everything_on():
    stream, taken = io.StringIO(), []
    with redirect_stdout(Tee(stream, taken.append)):
        print("one")
        print("two", end="")
    assert stream.getvalue() == "one\ntwo" and taken == ["one"]


def test_nodes_that_are_done_wait_while_the_weights_are_converted(monkeypatch: pytest.MonkeyPatch):
    class Agent:
        def __init__(self, spec: object, exit_barrier_timeout: float = 300):
            self.waits = exit_barrier_timeout

    monkeypatch.setattr(api, "LocalElasticAgent", Agent)
    entrypoint._let_agents_wait()
    assert "exit_barrier_timeout" in inspect.signature(LocalElasticAgent.__init__).parameters
    assert api.LocalElasticAgent(None).waits == entrypoint.HOST_PATIENCE_SECONDS
