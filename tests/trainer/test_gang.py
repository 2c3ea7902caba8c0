"""Several nodes, each with its own entrypoint, and failing ranks: the reaction of the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest
from ports import free_port

from trainer.exitcodes import ExitCode
from trainer.spec import TrainSpec

pytestmark = pytest.mark.slow  # up to four processes that import PyTorch

HANG_SECONDS = 45  # start-up and every step before the one that hangs take less, even on a busy machine


def start(spec: TrainSpec, directory: Path, fault: str, node: int = 0, **extra: str) -> subprocess.Popen:
    message = directory / f"termination-log-{node}"
    message.touch()
    file = micro.write_spec(spec, directory / f"spec-{node}.yaml")
    variables = {"FAULT": fault, "YAONGI_TERMINATION_LOG": str(message), "NODE_NAME": f"node-{node}", **extra}
    environment = micro.environment(PET_NPROC_PER_NODE="1", **variables)
    return subprocess.Popen([sys.executable, micro.FAULTY, "--spec", str(file)], env=environment)


def test_a_hang_names_rank_node_and_phase(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", runtime={"hang_timeout_seconds": HANG_SECONDS})
    assert start(spec, tmp_path, "stall 3").wait(timeout=280) == ExitCode.HANG
    message = json.loads((tmp_path / "termination-log-0").read_text())
    assert message["code"] == ExitCode.HANG and message["retryable"]
    assert message["reason"].startswith(
        f"rank 0: no step finished for {HANG_SECONDS} s (train.runtime.hang_timeout_seconds) on node-0, "
    )
    assert "which hangs in data of step 3; stacks" in message["reason"]


@pytest.mark.parametrize(("fault", "codes"), [("late", {0: 0, 1: 0}), ("die", {0: ExitCode.COMMUNICATION, 1: 137})])
def test_no_node_ends_well_before_every_rank_has(micro_data: Path, tmp_path: Path, fault: str, codes: dict[int, int]):
    """An elastic job counts as done when the first worker exits 0, and its other workers are deleted."""
    reached = tmp_path / "reached"
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=2)
    meeting = {
        "PET_NNODES": "2:2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_RDZV_ID": "gang",
        "PET_MAX_RESTARTS": "0",
    }
    nodes = {node: start(spec, tmp_path, f"{fault} {reached}", node, **meeting) for node in (0, 1)}
    found: dict[int, int] = {}
    deadline = time.monotonic() + 280
    while len(found) < 2 and time.monotonic() < deadline:
        for node, process in nodes.items():
            if node not in found and (code := process.poll()) is not None:
                assert reached.exists() or code, f"node {node} ended well while a rank was still at work"
                found[node] = code
        time.sleep(0.05)
    # The rendezvous decides which of the two is rank 0.
    assert sorted(found.values()) == sorted(codes.values())
