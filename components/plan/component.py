from typing import NamedTuple

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
) -> NamedTuple("Planned", [("job", str), ("Output", list[str])]):
    """Resolve the form's fields into one validated job, and refuse one that cannot run here.

    Output has the job if several pods encode the text, otherwise nothing: kfp.local can loop only over an output of
    that name, and within a loop steps get nothing but its item.

    Args:
        preset: model and data to start from.
        steps: optimizer steps; 0 takes the preset's number.
        nodes: machines to train on; 0 takes the preset's number.
        gpus_per_node: GPUs of each machine; -1 takes the preset's number.
        datasets_pvc: claim for raw text, tokenizers and token files; empty takes the preset's.
        checkpoints_pvc: claim for runs; empty takes the preset's.
        trainer_image: image of the training job; empty takes the preset's.
        overrides: any other field of the job (JSON).

    Returns:
        job: the whole job (JSON), for all other steps.
    """
    fields = {name: value for name, value in locals().items() if name not in ("preset", "overrides")}
    from components.plan.length import continued
    from components.plan.step import resolve, runnable_here
    from components.running import step
    from trainer.specbase import to_json

    with step("plan"):
        job = continued(runnable_here(resolve(preset, overrides, **fields)))
        print(f"run {job.run_name}: {job.train.steps} steps of {job.train.batch.tokens_per_step} tokens", flush=True)
        return to_json(job), [to_json(job)] if job.shards.pods > 1 else []
