"""The tune step: a job's section `tune` as a separate job, from its data to its export.

The steps of the pipeline run one after the other in this process; the trainer's tasks are launched as for any run.
Finished steps are not repeated.
"""

from __future__ import annotations

from components.download.step import run as download
from components.hygiene.step import run as hygiene
from components.launch.step import run as launch
from components.plan.enough import text_suffices, tokens_suffice
from components.pretrained import check
from components.shards.step import run as shards
from components.tokenizer.step import run as tokenizer
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
    raw = download(tuned)
    text_suffices(tuned, raw)
    raw = hygiene(tuned, raw)
    tokens = shards(tuned, raw, tokenizer(tuned, raw))
    tokens_suffice(tuned, tokens)
    trained = launch(tuned, "train", tokens, pipeline_run)
    measured = launch(tuned, "evaluate", trained, pipeline_run)
    return launch(tuned, "export", measured, pipeline_run)
