"""Launch one task of a run (train, evaluate, export) where the spec says, and verify its artefact.

The run directory is the contract between launcher and trainer: the launcher writes `job.yaml`, `train.yaml` and
`preset.json` into it, the trainer adds its artefact, and only a verified artefact counts as success. A task whose
verified artefact exists does no work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.launch import local
from components.launch.artefacts import Task, finished
from manifests.nearest import PRESET_FILE, preset_file_text
from manifests.spec import JobSpec, job_file_text
from trainer import gate
from trainer.__main__ import load_spec
from trainer.checkpoints.checkpoint import candidates, latest, read_manifest
from trainer.checkpoints.length import continuable
from trainer.data.manifest import StageResult
from trainer.data.manifest import read_manifest as read_data_manifest
from trainer.errors import LaunchError, SpecError, VolumeError
from trainer.files import atomic_write
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml, to_stored_yaml

LENGTH = {"steps": True, "begun_with_steps": True}


def run(
    job: JobSpec,
    task: Task,
    after: StageResult | None = None,
    pipeline_run: str = "",
    train_with: str = "yaongi run JOB",
) -> StageResult:
    """Run `task` of `job`.

    Args:
        after: the result of the previous step.
        pipeline_run: id of the pipeline run, by which its exit handler finds the job; "" without a pipeline.
        train_with: the command to suggest if nothing has been trained yet.

    Raises:
        SpecError: there is nothing to evaluate or export.
        GateError: the evaluated model has not passed the gates of the job, so it is not exported.
        LaunchError: the run directory holds another run, the task failed or left no complete artefact, or its input
            changed.
        DataError, CheckpointError: shards or checkpoint cannot be read.
    """
    if after is not None:
        _check_input(job, after)
    if task != "train" and latest(job.run_dir) is None:  # checked before an empty run directory is created
        raise SpecError(f"{job.run_dir}: there is no checkpoint to {task}; train the job first: {train_with}")
    write_specs(job)
    if task == "export":
        gate.refuse(job.train_spec())
    done = finished(job, task)
    if done is not None:
        print(f"{task}: unchanged and verified, nothing to do{numbers_of(done)}", flush=True)
        if task == "export" and job.train.exporting.folder and job.cluster.target == "local":
            from trainer import exportlinks  # it reads the run, for which others need no import

            exportlinks.show(job.train_spec())  # the folder may be another one now
        return _passed(job, done)
    if job.cluster.target == "local":
        local.run(job, task)
    else:
        from components.launch import kubernetes

        kubernetes.run(job, task, pipeline_run)
    done = finished(job, task)
    if done is None:
        raise LaunchError(f"{task} ended without an error but left no finished result in {job.run_dir}; see its logs")
    return _passed(job, done)


def numbers_of(done: StageResult) -> str:
    """The numbers of a finished training, for those who read only this step's log (pipelines/runs/standing.py)."""
    summary = done.summary
    return f" (step {summary['steps']}, loss {float(summary['loss_last']):.4f})" if "loss_last" in summary else ""


def _passed(job: JobSpec, done: StageResult) -> StageResult:
    """The result of a task; of an evaluation only if the model passes the gates."""
    if done.kind == "evaluate":
        gate.refuse(job.train_spec())
    return done


def run_file(task: Task, file: str, ranks: int, sets: Sequence[str]) -> None:
    """Run a task of a TrainSpec file on this machine. Raises as `run`."""
    local.run_entrypoint(task, file, ranks, sets)
    if task == "evaluate":
        gate.refuse(load_spec(file, sets))


def write_specs(job: JobSpec) -> None:
    """Write job.yaml, train.yaml and preset.json, which the report shows, to the run directory, each atomically.

    Raises:
        LaunchError: the directory holds a run that computes something else.
        VolumeError: it cannot be written.
        SpecError: the run cannot be continued with this length.
        CheckpointError: its checkpoints are damaged.
    """
    run_dir, spec = Path(job.run_dir), job.train_spec()
    path = run_dir / "train.yaml"
    if path.exists():
        other = parse(TrainSpec, read_yaml(path), str(path))
        changed = sorted(name for name, value in _identity(spec).items() if value != _identity(other)[name])
        if changed:
            raise LaunchError(
                f"{run_dir} holds a run with other values of {', '.join(changed)}; give this job another name"
            )
        continuable(candidates(run_dir), spec)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(run_dir / "job.yaml", job_file_text(job))
        atomic_write(path, to_stored_yaml(spec))
        atomic_write(run_dir / PRESET_FILE, preset_file_text(job))
    except OSError as error:
        raise VolumeError(
            f"{run_dir}: cannot be written ({error.strerror}); mount the checkpoints volume there or set "
            "storage.checkpoints_dir"
        ) from None


def _identity(spec: TrainSpec) -> dict[str, object]:
    """The fields that define what a run computes. Paths, the layout of its processes and future skips may change
    between two launches, as for `JobSpec.run_name`."""
    how = {"run_dir": True, "parallel": True, "runtime": True, "evaluate": True, "export": True}
    return spec.model_dump(mode="json", exclude=how | LENGTH | {"tokens": {"shards", "tokenizer", "skip"}})


def _check_input(job: JobSpec, result: StageResult) -> None:
    if result.kind == "shards":
        shards = read_data_manifest(job.stage_dir("shards"), "shards")
        digest = (shards.at(result.digest) or shards).digest  # more may have been appended since
    elif result.kind == "tokenizer":  # several pods made the shards with it
        used = [each.inputs["tokenizer"] for each in read_data_manifest(job.stage_dir("shards"), "shards").generations]
        digest = result.digest if result.digest in used else used[-1]
    elif result.kind in ("train", "evaluate"):
        checkpoint = latest(job.run_dir)
        digest = read_manifest(checkpoint).digest if checkpoint else "no checkpoint"
    else:
        raise LaunchError(f"a launched task cannot start from the result of '{result.kind}'")
    if digest != result.digest:
        raise LaunchError(
            f"{result.path} changed since the step before made it ({digest[:12]} instead of {result.digest[:12]}); "
            "run the pipeline again"
        )
