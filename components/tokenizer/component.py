from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def tokenizer(job: str, raw: str) -> str:
    """Train the tokenizer on a sample of the raw text; returns a StageResult (JSON)."""
    from components.running import step
    from components.tokenizer.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("tokenizer"):
        return run(job_from_json(job), StageResult.from_json(raw)).to_json()
