from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def shards(job: str, raw: str, tokenizer: str) -> str:
    """Turn raw text into token files; returns a StageResult (JSON)."""
    from components.running import step
    from components.shards.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("shards"):
        return run(job_from_json(job), StageResult.from_json(raw), StageResult.from_json(tokenizer)).to_json()
