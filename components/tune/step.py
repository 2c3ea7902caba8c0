"""The tune step: a job's section `tune` as a separate job, from its data to its export.

The steps of the pipeline run one after the other in this process; the trainer's tasks are launched as for any run.
Finished steps are not repeated.
"""

from __future__ import annotations

from components.data.step import run as prepare
from components.launch.step import run as launch
from components.pretrained import check
from manifests.spec import JobSpec
from trainer.data.manifest import StageResult


def run(job: JobSpec, after: StageResult, pipeline_run: str = "") -> StageResult:
    """Tune, or report that the job has no section `tune`.

    Args:
        after: the result of the previous step, returned if there is nothing to do.
        pipeline_run: id of the pipeline run, by which its exit handler finds the jobs; "" outside a pipeline.

    Raises:
        SpecError, DataError, LaunchError, CheckpointError, VolumeError: as the steps of the pipeline.
    """
    if job.tune is None:
        print("tune: off in this job, the model stays as it is", flush=True)
        return after
    tuned = job.tuning()
    print(f"tune: run {tuned.run_name}: {tuned.train.steps} steps from {tuned.train.init_from}", flush=True)
    check(tuned, downloaded=False)
    trained = launch(tuned, "train", prepare(tuned).result, pipeline_run)
    measured = launch(tuned, "evaluate", trained, pipeline_run)
    return launch(tuned, "export", measured, pipeline_run)
