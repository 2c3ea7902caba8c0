"""Tasks of the trainer. Each runs here, or as a job of the cluster that it follows to its end."""

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def train(job: str, after: str, pipeline_run: str) -> str:
    """Train the model on the token files; returns the last checkpoint (StageResult, JSON).

    Args:
        job: the whole job, as `plan` returns it (JSON).
        after: result of the data steps: the token files, or the tokenizer they were made with (StageResult, JSON).
        pipeline_run: id of the pipeline's run, by which `cleanup` finds the jobs.
    """
    from components.launch.step import run
    from components.running import step
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("train"):
        return run(job_from_json(job), "train", StageResult.from_json(after), pipeline_run).to_json()


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def evaluate(job: str, after: str, pipeline_run: str) -> str:
    """Measure the trained model on held-out text and benchmarks, and check the job's gates; returns a StageResult
    (JSON).

    Args:
        job: the whole job, as `plan` returns it (JSON).
        after: result of `train` (StageResult, JSON).
        pipeline_run: id of the pipeline's run, by which `cleanup` finds the jobs.
    """
    from components.launch.step import run
    from components.running import step
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("evaluate"):
        return run(job_from_json(job), "evaluate", StageResult.from_json(after), pipeline_run).to_json()
