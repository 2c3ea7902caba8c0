from typing import NamedTuple

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def tokenizer(job: str, raw: str) -> NamedTuple("Trained", [("tokenizer", str), ("Output", list[str])]):
    """Train the tokenizer on a sample of the raw text; returns a StageResult (JSON), and the ranges for `encode`.

    The ranges are called Output because kfp.local can loop only over an output of that name.

    Args:
        job: the whole job, as `plan` returns it (JSON).
        raw: result of `hygiene` or `download` (StageResult, JSON).
    """
    from components.running import step
    from components.shards.ranges import ranges
    from components.tokenizer.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("tokenizer"):
        spec, texts = job_from_json(job), StageResult.from_json(raw)
        trained = run(spec, texts)
        return trained.to_json(), [one.model_dump_json() for one in ranges(spec, texts, trained)]
