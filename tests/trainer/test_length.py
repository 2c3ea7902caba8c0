"""An extended run trains like one that had the length from the start, or says from which step it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import micro
import pytest

from trainer.checkpoints.checkpoint import candidates, published
from trainer.checkpoints.length import continuable
from trainer.errors import SpecError
from trainer.loop import train
from trainer.spec import TrainSpec

pytestmark = pytest.mark.usefixtures("leave_no_traces", "quiet_checkpoint_library")
OFTEN = {"every_steps": 3, "keep_last": 2}


def numbers(spec: TrainSpec) -> list[tuple[float, float, int]]:
    return [(line["loss"], line["learning_rate"], line["tokens"]) for line in micro.metrics(spec)]


def test_longer_run_equals_one_of_that_length_from_the_start(micro_data: Path, tmp_path: Path):
    whole = micro.micro_spec(micro_data, tmp_path / "whole", steps=12, checkpoint=OFTEN)
    assert train(whole) == 0
    short = micro.micro_spec(micro_data, tmp_path / "short", steps=8, checkpoint=OFTEN)
    assert train(short) == 0, "its decay begins after step 6, of which a checkpoint stays"
    assert [path.name for path in published(tmp_path / "short")][-1] == "step-00000006"
    longer: TrainSpec = short.updated({"steps": 12, "begun_with_steps": 8})
    assert train(longer) == 0
    assert numbers(longer) == numbers(whole)


def test_length_that_a_run_cannot_take_on_is_refused(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=5, checkpoint=OFTEN)
    assert train(spec) == 0
    for steps, words in ((4, "stands at step 5, beyond train.steps 4"),):
        with pytest.raises(SpecError, match=words):
            continuable(candidates(spec.run_dir)[:1], spec.updated({"steps": steps}))
    assert [path.name for path in continuable(candidates(spec.run_dir), spec.updated({"steps": 9}))] == [
        "step-00000003"
    ]
    with pytest.raises(SpecError, match=r"is 5 steps long now and stands at step 5; as a run of 4 .* from step 3 on"):
        continuable(candidates(spec.run_dir), spec.updated({"steps": 4}))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    with pytest.raises(SpecError, match=r"depends on the length from step 4 on"):
        continuable(candidates(spec.run_dir), spec.updated({"steps": 9}))
