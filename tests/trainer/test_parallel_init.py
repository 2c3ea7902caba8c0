"""The requested model, built as one rank of 64 in a single process; the other ranks are simulated."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest

from manifests.spec import load_job
from trainer.arithmetic.memory import training_memory
from trainer.parallel.layout import Layout

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(64, "fsdp", 64), Layout(64, "fsdp", 64, expert=32)],
    ids=str,
)
def test_no_rank_ever_holds_the_whole_model(layout: Layout, tmp_path: Path):
    """Rank 0 holds the most."""
    (output,) = forked.done(forked.run("init_rank", 1, [json.dumps(vars(layout))], tmp_path))
    measured = json.loads(output.splitlines()[-1])
    spec = load_job("h100-4b").train.model
    assert measured["held"] == training_memory(spec, layout=layout).weights, "what the arithmetic says"
    assert measured["held"] < training_memory(spec).weights / 25
    assert measured["grown"] < measured["held"] + 160 * MIB, "beyond it: a block, token classes, 1,500 small objects"
