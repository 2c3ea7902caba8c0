from typing import NamedTuple

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def data(job: str) -> NamedTuple("Prepared", [("job", str), ("result", str), ("Output", list[str])]):
    """Find the run on the volumes, fetch the text, mark what training leaves out, make tokenizer and token files.

    With shards.pods above 1 it ends with the tokenizer, and Output has the ranges for `encode`; otherwise Output is
    empty. kfp.local can loop only over an output of that name.

    Args:
        job: the job, as `plan` returns it (JSON).

    Returns:
        job: the job as the run that it begins or continues (JSON), for all other steps.
        result: the token files or the tokenizer (StageResult, JSON), which `train` follows.
    """
    from components.data.step import begun, run
    from components.running import step
    from manifests.spec import job_from_json
    from trainer.specbase import to_json

    with step("volumes"):
        spec = begun(job_from_json(job))
    made = run(spec, step, to_share_out=True)
    return to_json(spec), made.result.to_json(), [one.model_dump_json() for one in made.parts]
