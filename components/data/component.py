from typing import NamedTuple

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def data(job: str) -> NamedTuple("Prepared", [("result", str), ("Output", list[str])]):
    """Fetch the text, mark what training leaves out, train the tokenizer, and make the token files.

    With shards.pods above 1 it ends with the tokenizer, and Output has the ranges for `encode`; otherwise Output is
    empty. kfp.local can loop only over an output of that name.

    Args:
        job: the whole job, as `plan` returns it (JSON).

    Returns:
        result: the token files or the tokenizer (StageResult, JSON), which `train` follows.
    """
    from components.data.step import run
    from components.running import step
    from manifests.spec import job_from_json

    made = run(job_from_json(job), step, to_share_out=True)
    return made.result.to_json(), [one.model_dump_json() for one in made.parts]
