import json
from pathlib import Path

import pytest
import yaml

from components.launch import kubernetes, local
from components.launch.step import run, write_specs
from manifests.spec import JobSpec, job_from
from trainer.checkpoints.checkpoint import CheckpointManifest, describe_files, publish, unfinished_dir
from trainer.data.manifest import StageResult
from trainer.errors import ForeseenError, LaunchError, VolumeError
from trainer.evaluatespec import measured
from trainer.evaluation.tasks import TASK_FILES, files_digest
from trainer.spec import TrainSpec
from trainer.specbase import SpecError, parse


@pytest.fixture
def job(tmp_path) -> JobSpec:
    return job_for(tmp_path)


def job_for(tmp_path, **changes) -> JobSpec:
    places = {"datasets_dir": str(tmp_path / "datasets"), "checkpoints_dir": str(tmp_path / "checkpoints")}
    base = {"preset": "tiny", "storage": places, "cluster": {"target": "local"}}
    return job_from(base, {"train": {"steps": 4}, **changes})


def leave_training(job: JobSpec, weights: bytes = b"weights") -> str:
    """Write what a finished training leaves: a checkpoint of its last step and result.json; returns the digest."""
    draft = unfinished_dir(job.run_dir, job.train.steps)
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "weights.distcp").write_bytes(weights)
    manifest = CheckpointManifest(
        step=job.train.steps,
        spec={},
        code_version="1",
        digests={},
        cursor={},
        world_size=2,
        scalars={},
        files=describe_files(draft, ["weights.distcp"]),
    )
    path = publish(job.run_dir, manifest)
    digest = json.loads((path / "checkpoint.json").read_text())["digest"]
    result = {"steps": job.train.steps, "tokens": 16384, "loss_first": 8.0, "loss_last": 7.0, "seconds": 3.0}
    result |= {"tokens_per_second": 5000.0, "checkpoint": str(path), "checkpoint_digest": digest}
    (Path(job.run_dir) / "result.json").write_text(json.dumps(result))
    return digest


def leave_evaluation(job: JobSpec, digest: str, **more: str) -> None:
    value = {"checkpoint_digest": digest, "settings": measured(job.train_spec().evaluate), **more}
    value["domains"] = {"ko": {"bits_per_byte": 2.5}}
    (Path(job.run_dir) / "report.html").write_text("report")
    (Path(job.run_dir) / "eval.json").write_text(json.dumps(value))


def leave_export(job: JobSpec, digest: str) -> None:
    folder = Path(job.run_dir) / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"tensors")
    files = {name: entry.model_dump() for name, entry in describe_files(folder, ["model.safetensors"]).items()}
    (folder / "manifest.json").write_text(json.dumps({"checkpoint_digest": digest, "files": files}))


@pytest.fixture
def launched(monkeypatch):
    """Record tasks instead of starting them; `effects` is what each task writes."""

    class Started(list):
        def __init__(self):
            super().__init__()
            self.effects = {}

        def run(self, job, task):
            self.append(task)
            self.effects.get(task, lambda job: None)(job)

    started = Started()
    monkeypatch.setattr(local, "run", started.run)
    return started


def test_a_task_is_launched_and_its_artefact_verified(job, launched):
    launched.effects["train"] = leave_training
    result = run(job, "train")
    assert launched == ["train"]
    assert result.kind == "train" and result.path.endswith("checkpoints/step-00000004")
    assert result.summary["tokens"] == 16384
    spec = yaml.safe_load((Path(job.run_dir) / "train.yaml").read_text())
    assert spec["run"] == job.run_name and spec["steps"] == 4


def test_a_finished_task_does_no_work(job, launched):
    digest = leave_training(job)
    leave_evaluation(job, digest)
    leave_export(job, digest)
    assert {task: run(job, task).digest for task in ("train", "evaluate", "export")} == dict.fromkeys(
        ("train", "evaluate", "export"), digest
    )
    assert launched == []


@pytest.mark.parametrize("task", ["evaluate", "export"])
def test_what_was_never_trained_leaves_no_run_behind(job, launched, task):
    with pytest.raises(SpecError, match=f"there is no checkpoint to {task}; train the job first: yaongi run mine$"):
        run(job, task, train_with="yaongi run mine")
    assert launched == [] and not Path(job.run_dir).exists()


def test_a_finished_run_is_not_started_again(job, launched, yaongi, monkeypatch, tmp_path):
    write_specs(job)
    digest = leave_training(job)
    leave_evaluation(job, digest)
    monkeypatch.setattr("pipelines.background.start", lambda *_: pytest.fail("it was started"))
    leave_export(job, digest)
    code, out, _ = yaongi("resume", job.run_dir, "--workdir", str(tmp_path))
    assert code == 0 and f"{job.run_name} is finished: 4 steps, model in " in out


def test_a_task_that_leaves_nothing_has_failed(job, launched):
    with pytest.raises(LaunchError, match="train ended without an error but left no finished result"):
        run(job, "train")


def test_training_that_stopped_early_goes_on(job, launched):
    leave_training(job)
    path = Path(job.run_dir) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 3}))
    launched.effects["train"] = leave_training
    run(job, "train")
    assert launched == ["train"]


def test_a_damaged_checkpoint_is_no_success(job, launched):
    leave_training(job)
    damaged = Path(job.run_dir) / "checkpoints/step-00000004/weights.distcp"
    damaged.write_bytes(b"weightz")
    with pytest.raises(ForeseenError, match=r"weights\.distcp differs from what was written"):
        run(job, "train")


def test_evaluation_is_done_again_for_other_settings_or_another_checkpoint(job, launched, tmp_path):
    digest = leave_training(job)
    leave_evaluation(job, digest)
    changed = job_for(tmp_path, train={"steps": 4, "evaluate": {"max_tokens": 10}})
    assert changed.run_dir == job.run_dir
    launched.effects["evaluate"] = lambda job: leave_evaluation(job, digest)
    run(changed, "evaluate")
    assert launched == ["evaluate"]
    digest = leave_training(job, b"other weights")
    run(changed, "evaluate")
    assert launched == ["evaluate", "evaluate"]


def test_evaluation_is_done_again_when_an_own_task_was_changed(launched, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\n")
    job = job_for(tmp_path, train={"steps": 4, "evaluate": {"task_files": str(own), "tasks": ["mine"]}})
    digest = leave_training(job)
    launched.effects["evaluate"] = lambda job: leave_evaluation(job, digest, **{TASK_FILES: files_digest(str(own))})
    for _ in range(2):
        run(job, "evaluate")
        assert launched == ["evaluate"]
    (own / "mine.yaml").write_text("task: mine\ndoc_to_text: other\n")
    run(job, "evaluate")
    assert launched == ["evaluate", "evaluate"]


def test_evaluation_is_done_again_when_its_report_is_missing(job, launched):
    digest = leave_training(job)
    leave_evaluation(job, digest)
    (Path(job.run_dir) / "report.html").unlink()
    launched.effects["evaluate"] = lambda job: leave_evaluation(job, digest)
    run(job, "evaluate")
    assert launched == ["evaluate"]


@pytest.mark.parametrize(
    ("task", "file"), [("train", "result.json"), ("evaluate", "eval.json"), ("export", "export/manifest.json")]
)
def test_an_artefact_without_its_fields_is_one_clear_line(job, launched, task, file):
    digest = leave_training(job)
    leave_evaluation(job, digest)
    leave_export(job, digest)
    (Path(job.run_dir) / file).write_text("{}")
    with pytest.raises(ForeseenError, match=f"{file}: has no '.*'; remove it and run the same command again") as error:
        run(job, task)
    assert error.value.code == 66 and launched == []


def test_training_whose_first_step_was_skipped_is_finished(job, launched):
    leave_training(job)
    path = Path(job.run_dir) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss_first": None}))
    assert "loss_first" not in run(job, "train").summary
    assert launched == []


def test_a_changed_export_is_written_again(job, launched):
    digest = leave_training(job)
    leave_export(job, digest)
    model = Path(job.run_dir) / "export" / "model.safetensors"
    model.write_bytes(b"tensorz")
    launched.effects["export"] = lambda job: model.write_bytes(b"tensors")
    run(job, "export")
    assert launched == ["export"]


def test_an_export_of_another_dtype_is_written_again(job, launched, tmp_path):
    leave_export(job, leave_training(job))
    wide = job_for(tmp_path, train={"steps": 4, "export": {"dtype": "fp32"}})
    assert wide.run_name == job.run_name
    manifest = Path(job.run_dir) / "export" / "manifest.json"
    written = json.loads(manifest.read_text()) | {"transformers_dtype": "fp32"}
    launched.effects["export"] = lambda job: manifest.write_text(json.dumps(written))
    for _ in range(2):
        run(wide, "export")
    assert launched == ["export"]


def test_a_run_directory_of_another_run_is_refused(job, launched):
    write_specs(job)
    path = Path(job.run_dir) / "train.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(LaunchError, match="holds a run with other values of seed, tokens"):
        run(job, "train")
    assert launched == []


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": {"log_every_steps": 1}},
        {"parallel": {"data": "fsdp"}},
        {"evaluate": {"sample_tokens": 2}},
        {"export": {"dtype": "fp32"}},
        {"skip": ((4096, 8192),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_leaves_the_runs_name_as_it_is_may_change_between_launches(job, launched, tmp_path, change):
    write_specs(job)
    other = job_for(tmp_path, train={"steps": 4} | change)
    assert other.run_dir == job.run_dir and other != job
    write_specs(other)
    assert parse(TrainSpec, yaml.safe_load((Path(job.run_dir) / "train.yaml").read_text())) == other.train_spec()


def test_a_checkpoints_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(VolumeError, match=r"cannot be written .*storage\.checkpoints_dir"):
        write_specs(job_for(tmp_path))


def test_evaluation_refuses_a_checkpoint_that_moved_on(job, launched):
    trained = StageResult(kind="train", path="x", digest=leave_training(job))
    leave_training(job, b"other weights")
    with pytest.raises(LaunchError, match="changed since the step before made it"):
        run(job, "evaluate", trained)
    assert launched == []


def test_on_kubernetes_the_task_becomes_a_job(tmp_path, monkeypatch, launched):
    job = job_for(tmp_path, cluster={"target": "kubernetes"})
    submitted = []
    monkeypatch.setattr(kubernetes, "run", lambda job, *given: submitted.append(given) or leave_training(job))
    run(job, "train", pipeline_run="r1")
    assert (submitted, launched) == ([("train", "r1")], [])
