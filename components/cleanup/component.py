from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def cleanup(pipeline_run: str, preset: str, overrides: str, ended: dsl.PipelineTaskFinalStatus):
    """Stop the training jobs that this pipeline run left behind; `ended` marks it as the exit handler's step."""
    from components.plan.step import placement

    where = placement(preset, overrides)
    if where is not None and where.target == "kubernetes":
        from components.cleanup.step import run
        from components.running import step

        with step("cleanup"):
            run(pipeline_run, where)
