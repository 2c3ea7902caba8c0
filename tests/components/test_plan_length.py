"""Which run a job extends, and what may change while a run is in progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.launch.step import write_specs
from components.plan import length
from manifests.spec import JobSpec, load_job
from trainer.checkpoints.checkpoint import CheckpointManifest, publish, unfinished_dir
from trainer.errors import SpecError


def job_of(folder: Path, steps: int, **train: object) -> JobSpec:
    places = {"datasets_dir": str(folder / "data"), "checkpoints_dir": str(folder / "checkpoints")}
    return load_job("tiny", {"storage": places, "train": {"steps": steps, **train}})


def leave(job: JobSpec, *steps: int) -> None:
    write_specs(job)
    for step in steps:
        unfinished_dir(job.run_dir, step).mkdir(parents=True)
        publish(
            job.run_dir,
            CheckpointManifest(
                step=step, spec=job.train_spec().model_dump(mode="json"), code_version="", digests={}, cursor={},
                world_size=1, scalars={}, files={},
            ),
        )  # fmt: skip


def test_a_longer_job_goes_on_with_the_shorter_run(tmp_path: Path):
    leave(job_of(tmp_path, 100), 40)
    longer = length.continued(job_of(tmp_path, 200))
    assert (longer.run_name, longer.train.steps) == (job_of(tmp_path, 100).run_name, 200)
    write_specs(longer)
    assert length.continued(job_of(tmp_path, 200)) == longer, "also the next time"
    other = job_of(tmp_path, 200, seed=1)
    assert length.continued(other) == other


def test_a_run_past_its_decay_is_not_gone_on_with(tmp_path: Path, capsys):
    leave(job_of(tmp_path, 100), 90, 100)
    job = job_of(tmp_path, 200)
    assert length.continued(job) == job and "a new run" in capsys.readouterr().out
    with pytest.raises(SpecError, match="from step 80 on"):
        length.changed(job_of(tmp_path, 100), {"train": {"steps": 200}}, job_of(tmp_path, 100).run_name)


def test_the_step_from_before_the_decay_is_named(tmp_path: Path, capsys):
    job = job_of(tmp_path, 100)
    leave(job, 80, 90)
    longer = length.changed(job, {"train": {"steps": 150}}, job.run_name)
    assert longer.train.begun_with_steps == 100 and "from step 80 on" in capsys.readouterr().out
    write_specs(longer)
    with pytest.raises(SpecError, match="beyond train"):
        length.changed(longer, {"train": {"steps": 50}}, job.run_name)
    assert length.changed(longer, {"train": {"steps": 100}}, job.run_name).train.begun_with_steps is None


def test_what_makes_another_run_is_refused(tmp_path: Path):
    job = job_of(tmp_path, 100)
    with pytest.raises(SpecError, match="another run"):
        length.changed(job, {"train": {"seed": 1}}, job.run_name)
