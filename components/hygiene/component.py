"""Hygiene step: list the documents that training leaves out, beside the raw text."""

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def hygiene(job: str, raw: str) -> str:
    """Mark duplicates and contaminated documents, if the job asks for it; returns the raw text's StageResult (JSON).

    Args:
        job: the whole job, as `plan` returns it (JSON).
        raw: result of `download` (StageResult, JSON).
    """
    from components.hygiene.step import run
    from components.running import step
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("hygiene"):
        return run(job_from_json(job), StageResult.from_json(raw)).to_json()
