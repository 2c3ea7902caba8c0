from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def plan(
    preset: str,
    steps: int,
    nodes: int,
    gpus_per_node: int,
    datasets_pvc: str,
    checkpoints_pvc: str,
    trainer_image: str,
    overrides: str,
) -> str:
    """Resolve the form's fields into one validated JobSpec (JSON)."""
    fields = {name: value for name, value in locals().items() if name not in ("preset", "overrides")}
    from components.plan.length import continued
    from components.plan.step import resolve, runnable_here
    from components.running import step
    from trainer.specbase import to_json

    with step("plan"):
        job = continued(runnable_here(resolve(preset, overrides, **fields)))
        print(f"run {job.run_name}: {job.train.steps} steps of {job.train.batch.tokens_per_step} tokens", flush=True)
        return to_json(job)
