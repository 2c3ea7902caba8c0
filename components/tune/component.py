from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def tune(job: str, after: str, pipeline_run: str) -> str:
    """Tune the exported model on the job's chats, if it has a section `tune`: data, training, evaluation, export.
    Returns a StageResult (JSON)."""
    from components.running import step
    from components.tune.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("tune"):
        return run(job_from_json(job), StageResult.from_json(after), pipeline_run).to_json()
