"""Optimizers that split work and state over ranks give the results of one process, without duplicate work."""

import forked
import pytest


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.proof])])
def test_ranks_together_equal_one_alone(ranks, tmp_path):
    outputs = forked.done(forked.run("optim_ranks", ranks, [tmp_path], tmp_path))
    assert all(f"rank {rank} done" in output for rank, output in enumerate(outputs))
