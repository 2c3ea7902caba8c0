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
    hub_secret: str,
    overrides: str,
) -> NamedTuple("Planned", [("job", str), ("Output", list[str])]):
    """Resolve the form's fields into one validated job, and refuse one that the cluster cannot run.

    It mounts no volume: a pod that mounts an absent claim waits for ever, while this one says so. Output has one entry
    if several pods encode the text, otherwise none: kfp.local can loop only over an output of that name.

    Args:
        preset: model and data to start from.
        steps: optimizer steps; 0 takes the preset's number.
        nodes: machines to train on; 0 takes the preset's number.
        gpus_per_node: GPUs of each machine; -1 takes the preset's number.
        datasets_pvc: claim for raw text, tokenizers and token files; empty takes the preset's.
        checkpoints_pvc: claim for runs; empty takes the preset's.
        trainer_image: image of the training job; empty takes the preset's.
        hub_secret: Secret with the token for the Hugging Face Hub; empty takes the preset's.
        overrides: any other field of the job (JSON).

    Returns:
        job: the whole job (JSON), for `data`.
    """
    fields = {name: value for name, value in locals().items() if name not in ("preset", "overrides")}
    from components.plan.admissible import refuse_inadmissible
    from components.plan.step import resolve
    from components.running import step
    from trainer.specbase import to_json

    with step("plan"):
        job = resolve(preset, overrides, **fields)
        refuse_inadmissible(job)
        return to_json(job), [f"{job.shards.pods} pods"] if job.shards.pods > 1 else []
