"""Data is prepared separately, stage by stage, by the pipeline's own steps; the run continues from it."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
from small_job import small_job

from pipelines.execute import cut_after
from pipelines.prepare import Stage
from pipelines.pretrain import pretrain


@pytest.mark.parametrize("stage", Stage)
def test_the_pipeline_is_cut_off_after_a_stage(stage: Stage) -> None:
    spec = deepcopy(pretrain.pipeline_spec)
    cut_after(stage.value, spec)
    (dag,) = (each.dag for each in spec.components.values() if "plan" in each.dag.tasks)
    names = {re.sub(r"-\d+$", "", name) for name in dag.tasks}  # loops are numbered through a process
    assert names == {"plan", "data"} | ({"for-loop"} if stage is Stage.SHARDS else set())
    assert "cleanup" in spec.root.dag.tasks


def test_what_was_made_is_shown_and_no_run_begins(yaongi, tmp_path) -> None:
    job = str(small_job(tmp_path))
    code, out, error = yaongi("prepare", job, "--until", "download", "--set", "seed=1", "--workdir", "w")
    assert code == 2 and "train.seed" in error
    for stage, made in ((Stage.DOWNLOAD, {"raw"}), (Stage.HYGIENE, {"raw"}), (Stage.TOKENIZER, {"raw", "tokenizers"})):
        code, out, error = yaongi("prepare", job, "--until", stage.value, "--set", "train.seed=1", "--workdir", "w")
        assert code == 0, error
        assert "prose (en)" in out and "300" in out and "train tokens" not in out
        assert out.endswith(f"next: yaongi prepare {job} --set train.seed=1 --workdir w\n")
        # Hygiene, for which this job does not ask, leaves nothing.
        assert {path.parents[1].name for path in (tmp_path / "w").glob("datasets/*/*/manifest.json")} == made
    code, out, error = yaongi("prepare", job, "--workdir", "w")
    assert code == 0, error
    assert list((tmp_path / "w").glob("datasets/shards/*/manifest.json"))
    assert "train tokens" in out and out.endswith(f"next: yaongi run {job} --workdir w\n")
    assert (
        not any((tmp_path / "w" / "checkpoints").glob("runs/*")) and "no runs" in yaongi("status", "--workdir", "w")[1]
    )


def test_too_little_data_is_said_by_the_data_steps(yaongi, tmp_path) -> None:
    many = ["--set", "train.steps=100000", "--set", "data.sources.prose.max_epochs=1", "--workdir", "w"]
    job = str(small_job(tmp_path))
    code, out, error = yaongi("run", job, *many)
    assert code == 65 and "▶ hygiene" not in out, out
    assert error.startswith("error: download: source 'prose' would need")
    code, out, error = yaongi("prepare", job, "--until", "download", *many)
    assert code == 0 and "too little for train.steps 100,000: source 'prose'" in out, error


@pytest.mark.slow
def test_the_sample_suffices_for_the_preset_that_trains_longest_on_it(yaongi) -> None:
    """`make run` shows it of `tiny`."""
    code, out, error = yaongi("prepare", "small", "--workdir", "w")
    assert code == 0 and out.endswith("next: yaongi run small --workdir w\n"), error
