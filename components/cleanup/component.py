from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def cleanup(pipeline_run: str, preset: str, overrides: str, ended: dsl.PipelineTaskFinalStatus):
    """Stop the training jobs that this pipeline run left behind.

    Args:
        pipeline_run: id of the pipeline's run, as the launchers got it.
        preset: the preset of the form, from which the cluster's settings come.
        overrides: the overrides of the form (JSON).
        ended: how the other steps ended; it marks this as the exit handler's step.
    """
    from components.plan.step import placement

    where = placement(preset, overrides)
    if where is not None and where.target == "kubernetes":
        from components.cleanup.step import run
        from components.running import step

        with step("cleanup"):
            run(pipeline_run, where)
