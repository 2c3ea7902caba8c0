"""Optimizers that share work and state over ranks do what one process does, and do it once."""

import subprocess
import sys
from pathlib import Path

import micro
import pytest


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.proof])])
def test_ranks_together_equal_one_alone(ranks, tmp_path):
    script = Path(__file__).with_name("optim_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=micro.environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == ranks
