from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def download(job: str) -> str:
    """Fetch the sources' documents onto the datasets volume; returns a StageResult (JSON).

    Args:
        job: the whole job, as `plan` returns it (JSON).
    """
    from components.download.step import run
    from components.plan.enough import text_suffices
    from components.running import step
    from manifests.spec import job_from_json

    with step("download"):
        spec = job_from_json(job)
        result = run(spec)
        text_suffices(spec, result)
        return result.to_json()
