from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def launch(job: str, task: str, after: str, pipeline_run: str) -> str:
    """Run a task of the trainer on the result of the previous step, here or as a job; returns a StageResult (JSON)."""
    from components.launch.step import run
    from components.running import step
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step(task):
        return run(job_from_json(job), task, StageResult.from_json(after), pipeline_run).to_json()
